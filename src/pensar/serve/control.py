"""POST /v1/requests/{id}/thinking: another thinking budget for a reply that is being written, or the answer at once."""

from typing import Literal

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pensar.base.errors import ModelError
from pensar.infer.engine import Engine
from pensar.serve.failure import invalid, not_running
from pensar.serve.service import Service
from pensar.serve.transport import JsonResponse
from pensar.serve.wire import read_request


class ThinkingChange(msgspec.Struct, kw_only=True):
    """The body: one of the two."""

    budget: int | msgspec.UnsetType | None = msgspec.UNSET
    """Most tokens of thinking in all; None lifts the limit."""
    finish: bool = False
    """The answer is wanted now."""


class ThinkingChanged(msgspec.Struct, kw_only=True):
    """The answer."""

    id: str
    changed: int
    """Choices that were still running."""
    object: Literal["request.thinking"] = "request.thinking"


async def change_thinking(service: Service, request: HttpRequest) -> Response:
    """Holds for every choice of the request that is still running. The id is that of the reply, known from its first
    chunk; whoever has it and the server's key may ask. Raises ApiError: 404 where no such request is running."""
    change = read_request(await service.read(request), ThinkingChange)
    if change.finish == (change.budget is not msgspec.UNSET):
        raise invalid('Send either {"budget": tokens}, null for no limit, or {"finish": true}.', "budget")
    if isinstance(change.budget, int) and change.budget < 0:
        raise invalid(f"budget {change.budget} is negative; use 0 to end the thinking.", "budget")
    name = request.path_params["id"]
    answer = service.running.get(name)
    if answer is None:
        raise not_running(name)
    names, budget = answer.unfinished, change.budget

    def apply(engine: Engine) -> int:
        if isinstance(budget, msgspec.UnsetType):
            return sum(engine.finish_thinking(each) for each in names)
        return sum(engine.set_budget(each, budget) for each in names)

    try:
        changed = await service.worker.call(apply)
    except ModelError as error:
        raise invalid(f"{error}.", "budget") from error
    if not changed:
        raise not_running(name)
    return JsonResponse(ThinkingChanged(id=name, changed=changed))
