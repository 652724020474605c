"""What lies between HTTP and the handlers: bodies with a limit, event streams, clients that leave, request ids."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pensar.serve.failure import ApiError
from pensar.serve.metrics import Counter

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment line: legal in an event stream and skipped by clients, it keeps idle connections open."""


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class JsonResponse(Response):
    """A msgspec struct as the body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def refusal(error: ApiError) -> Response:
    return Response(error.body, error.status, error.headers, media_type="application/json")


def event(data: Any) -> bytes:
    """One server-sent event with `data` as JSON."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body; raises ApiError (413) as soon as it is known to be longer than `max_bytes`."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(int(declared), max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(len(body), max_bytes)
    return bytes(body)


def _too_large(num_bytes: int, max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The body has at least {num_bytes} bytes; this server reads at most {max_bytes}. "
        "Send fewer or shorter messages.",
        code="request_too_large",
    )


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves first (then raises ClientGone).

    `receive` must have given the whole body already, so that the next message can only be the disconnect.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        leaving.cancel()
        # Both must have ended before the request does; their outcome no longer matters to anybody.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends the events of `events` as they come, until the client leaves; `on_end` is called in any case.

    An ApiError that the iterator raises becomes the last event, `{"error": ...}`, which clients raise in mid-stream.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], on_end: Callable[[], None], on_abort: Callable[[], None]
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end
        self._on_abort = on_abort

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            self._on_abort()
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        try:
            # Closed here and not by the garbage collector: its `finally` takes the request out of the engine.
            async with aclosing(self._events) as events:
                async for data in events:
                    await _send_data(send, data)
        except ApiError as error:
            await _send_data(send, b"data: " + error.body + b"\n\n")
        await _send_data(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_data(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


class Observe:
    """Middleware: gives every answer an `x-request-id` (the client's own, if it sent one) and counts it."""

    def __init__(self, app: ASGIApp, requests: Counter, paths: frozenset[str]) -> None:
        self._app = app
        self._requests = requests
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = sent if 0 < len(sent) <= 128 else f"req-{uuid.uuid4().hex}".encode()
        # A path that nobody serves is counted under one label: clients must not be able to grow the metrics.
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                self._requests.add(path=path, status=str(message["status"]))
            await send(message)

        await self._app(scope, receive, observed)


def timestamp() -> int:
    """Seconds since 1970, as the wire's `created` fields want them."""
    return int(time.time())
