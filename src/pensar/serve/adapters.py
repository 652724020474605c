"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters that come and go while the server answers.

Paths and fields are vLLM's. A loaded adapter is a model's name like any other: requests ask for it by `model`.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from pensar.base.errors import ConfigError, PensarError
from pensar.serve.failure import ApiError, invalid
from pensar.serve.service import Service
from pensar.serve.wire import read_request


class AdapterChange(msgspec.Struct, kw_only=True):
    """The body of both."""

    lora_name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    lora_path: str | None = None
    """Folder of the adapter on the server, in PEFT's format; to load."""


def check_adapter_name(name: str, model: str) -> None:
    """Raises ConfigError for a name that clients could not tell from the model's."""
    if not name or name == model:
        raise ConfigError(f"an adapter cannot have the name {name!r}, which is the model's; choose another")


async def load_adapter(service: Service, request: HttpRequest) -> Response:
    """Loads between two steps; what runs waits for it. Raises ApiError (400) where it is no adapter of this model."""
    change = await _allowed(service, request)
    if change.lora_path is None:
        raise invalid("lora_path is missing; give the adapter's folder on the server.", "lora_path")
    name, folder = change.lora_name, Path(change.lora_path)
    if name in service.adapters:
        raise invalid(f"The adapter {name!r} is loaded already; unload it first.", "lora_name")
    try:
        check_adapter_name(name, service.config.model_name)
        await service.worker.call(lambda engine: engine.load_adapter(name, folder))
    except PensarError as error:
        raise invalid(f"The adapter cannot be loaded: {error}.", "lora_path") from error
    service.adapters[name] = folder
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.\n")


async def unload_adapter(service: Service, request: HttpRequest) -> Response:
    """Raises ApiError: 404 for a name that is not loaded, 409 while unfinished requests use it."""
    change = await _allowed(service, request)
    name = change.lora_name
    folder = service.adapters.pop(name, None)  # from now on no new request gets it
    if folder is None:
        loaded = ", ".join(map(repr, service.adapters)) or "none"
        raise ApiError(
            404,
            f"The adapter {name!r} is not loaded; loaded: {loaded}.",
            kind="not_found_error",
            code="adapter_not_found",
            param="lora_name",
        )
    try:
        await service.worker.call(lambda engine: engine.unload_adapter(name))
    except PensarError as error:
        service.adapters[name] = folder
        raise ApiError(
            409, f"{error}.", code="adapter_in_use", param="lora_name", retry_after_seconds=1
        ) from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.\n")


async def _allowed(service: Service, request: HttpRequest) -> AdapterChange:
    """The body; ApiError (403) unless the server was started to allow this."""
    body = await service.read(request)
    if not service.config.adapter_changes:
        raise ApiError(
            403,
            "This server takes no adapters while it runs; start it with --adapter-changes to allow it.",
            code="adapter_changes_forbidden",
        )
    return read_request(body, AdapterChange)
