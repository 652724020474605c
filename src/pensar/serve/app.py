"""The application: routes, errors as OpenAI clients read them, health, readiness and metrics."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from pensar.infer.engine import Engine
from pensar.infer.generation import Generation
from pensar.infer.outbox import Outbox
from pensar.serve.adapters import check_adapter_name, load_adapter, unload_adapter
from pensar.serve.chat import answer_chat
from pensar.serve.completions import answer_completion
from pensar.serve.control import change_thinking
from pensar.serve.failure import ApiError
from pensar.serve.meter import Meter
from pensar.serve.metrics import ServerMetrics
from pensar.serve.service import ServeConfig, Service
from pensar.serve.transport import ClientGone, JsonResponse, Observe, refusal
from pensar.serve.wire import ModelCard, ModelList
from pensar.serve.worker import Worker
from pensar.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Handler = Callable[[Service, Request], Awaitable[Response]]

CLIENT_CLOSED_REQUEST = 499
"""Nobody reads this answer; the status is for the log and the metrics (nginx's convention)."""


def open_service(
    folder: Path,
    config: ServeConfig,
    *,
    device: str = "cpu",
    adapters: Mapping[str, Path] | None = None,
    outbox: Outbox | None = None,
    **options: Any,
) -> Service:
    """Loads the model directory `folder` behind a worker that is not started yet; `options` are those of LLM."""
    from pensar.infer.llm import LLM

    for name in adapters or ():
        check_adapter_name(name, config.model_name)
    llm = LLM(folder, device=device, adapters=adapters, **options)
    log.info("%s", llm.engine.footprint)
    service = make_service(llm.engine, llm.tokenizer, config, llm.generation, outbox=outbox)
    service.adapters.update(adapters or {})
    return service


def make_service(
    engine: Engine,
    tokenizer: Tokenizer,
    config: ServeConfig,
    generation: Generation | None = None,
    *,
    outbox: Outbox | None = None,
) -> Service:
    """A service over an engine that nobody else steps; without `generation` Qwen3's advice on sampling holds.

    What requests use is written to `outbox`, which is closed with the server.
    """
    worker = Worker(engine, max_waiting=config.max_waiting)
    metrics = ServerMetrics(config.model_name, lambda: worker.num_running, lambda: worker.num_waiting)
    worker.on_failure = metrics.engine_failures.add
    meter = None if outbox is None else Meter(outbox)
    if meter is not None:
        metrics.more = meter.metrics
    return Service(
        config,
        tokenizer,
        worker,
        metrics,
        context=engine.max_positions,
        vocab_size=engine.runner.config.vocab_size,
        grammars=engine.constraints.grammars,
        generation=generation or Generation(),
        meter=meter,
    )


def make_app(service: Service) -> Starlette:
    """The ASGI application; its lifespan starts and stops the engine's thread."""
    routes = [
        Route("/v1/chat/completions", _endpoint(service, answer_chat), methods=["POST"]),
        Route("/v1/completions", _endpoint(service, answer_completion), methods=["POST"]),
        Route("/v1/requests/{id}/thinking", _endpoint(service, change_thinking), methods=["POST"]),
        Route("/v1/load_lora_adapter", _endpoint(service, load_adapter), methods=["POST"]),
        Route("/v1/unload_lora_adapter", _endpoint(service, unload_adapter), methods=["POST"]),
        Route("/v1/models", _endpoint(service, _models), methods=["GET"]),
        Route("/v1/models/{name:path}", _endpoint(service, _model), methods=["GET"]),
        Route("/health", _endpoint(service, _health), methods=["GET"]),
        Route("/ready", _endpoint(service, _ready), methods=["GET"]),
        Route("/metrics", _endpoint(service, _metrics), methods=["GET"]),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            service.close()

    paths = frozenset(route.path for route in routes)
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Observe, requests=service.metrics.requests, paths=paths)],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
    )


def _endpoint(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(service, request)
        except ApiError as error:
            return refusal(error)
        except (ClientGone, ClientDisconnect):
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    return endpoint


async def _models(service: Service, request: Request) -> Response:
    service.authorize(request)
    names = [service.config.model_name, *service.adapters]
    return JsonResponse(ModelList(data=[_card(service, name) for name in names]))


async def _model(service: Service, request: Request) -> Response:
    service.authorize(request)
    adapter = service.adapter_of(request.path_params["name"])
    return JsonResponse(_card(service, adapter or service.config.model_name))


def _card(service: Service, name: str) -> ModelCard:
    base = service.config.model_name
    return ModelCard(
        id=name,
        created=service.created,
        max_model_len=service.context,
        root=service.adapters[name].name if name in service.adapters else base,
        parent=base if name in service.adapters else None,
    )


async def _health(service: Service, request: Request) -> Response:
    """Liveness: the engine's thread runs and its last step was not too long ago."""
    worker, limit = service.worker, service.config.max_silence_seconds
    if not worker.alive:
        return PlainTextResponse("the engine's thread has ended\n", 503)
    if worker.seconds_since_heartbeat > limit:
        return PlainTextResponse(f"the engine has been silent for over {limit:g} seconds\n", 503)
    return PlainTextResponse("ok\n")


async def _ready(service: Service, request: Request) -> Response:
    """Readiness: new requests are welcome."""
    if service.worker.refusing or not service.worker.alive:
        return PlainTextResponse("shutting down\n", 503)
    return PlainTextResponse("ready\n")


async def _metrics(service: Service, request: Request) -> Response:
    return PlainTextResponse(service.metrics.render(), media_type="text/plain; version=0.0.4")


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"There is nothing at {request.url.path}; the API begins at /v1."
        refused = refusal(ApiError(404, message, kind="not_found_error", code="not_found"))
    else:
        refused = refusal(
            ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        )
    refused.headers.update(error.headers or {})
    return refused


async def _internal_error(request: Request, error: Exception) -> Response:
    """A fault of ours; Starlette raises it again afterwards, so that the log has the traceback."""
    return refusal(ApiError(500, "The server made a mistake; its log says which.", kind="server_error"))
