"""Answer: one HTTP request in work, from its sequences in the engine to its replies and to the record of its usage."""

import threading
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec
from starlette.types import Receive

from pensar.infer.engine import Request
from pensar.serve.reply import Reply
from pensar.serve.service import Service
from pensar.serve.tally import Tally, totals_of
from pensar.serve.transport import ClientGone, while_connected
from pensar.serve.wire import Usage, usage
from pensar.text.reply import Delta


class Finishing(Protocol):
    """A request in work whose replies are wanted as a whole."""

    async def finish(self) -> None: ...
    def abandon(self) -> None: ...
    def close(self) -> None: ...


async def complete(work: Finishing, receive: Receive) -> None:
    """Runs `work` to its end; raises ClientGone when the client leaves first, and ApiError when it fails."""
    try:
        await while_connected(receive, work.finish())
    except ClientGone:
        work.abandon()
        raise
    finally:
        work.close()


class Answer:
    """Its sequences and their replies, in the order of the choices: as many of each prompt, prompt after prompt."""

    def __init__(
        self,
        service: Service,
        name: str,
        requests: Sequence[Request],
        replies: Sequence[Reply],
        num_prompts: int,
    ) -> None:
        """Raises ApiError (429, 503) where the server cannot take it. Whoever makes one calls `close` in the end."""
        self._service = service
        self.id = name
        self.requests = requests
        self.replies = replies
        self._lengths = [len(request.tokens) for request in requests[:: len(requests) // num_prompts]]
        self._started = time.monotonic()
        self._settled = False
        self._lock = threading.Lock()
        self._job = service.worker.submit(requests)
        service.running[name] = self

    @property
    def unfinished(self) -> list[str]:
        """The engine's ids of the sequences that go on."""
        pairs = zip(self.requests, self.replies, strict=True)
        return [request.id for request, reply in pairs if reply.finish_reason is None]

    def usage(self) -> Usage:
        """What the replies say that the request has used."""
        totals = totals_of(self._lengths, [reply.accounts for reply in self.replies])
        return usage(**msgspec.structs.asdict(totals))

    async def deltas(self) -> AsyncGenerator[tuple[int, list[Delta]] | None]:
        """(choice, deltas) as the engine makes them; None after each `keep_alive_seconds` of silence.

        Takes the sequences out of the engine when it is closed or cancelled early; that needs no await, as an
        await in a cancelled task would be cancelled itself.
        """
        first = True
        try:
            while any(reply.finish_reason is None for reply in self.replies):
                parts = await self._job.next(self._service.config.keep_alive_seconds)
                if first and parts:
                    self._service.metrics.first_token.observe(time.monotonic() - self._started)
                    first = False
                for part in parts:
                    reply = self.replies[part.index]
                    if reply.finish_reason is not None:
                        continue
                    deltas = reply.feed(part.piece)
                    if reply.stopped:
                        self._job.abort(part.index)
                    yield part.index, deltas
                if not parts:
                    yield None
        finally:
            self.close()

    async def finish(self) -> None:
        """Runs to the end; the replies then hold everything."""
        async for _ in self.deltas():
            pass

    def abandon(self) -> None:
        """Counts a client that left."""
        self._service.metrics.aborted.add()

    def close(self) -> None:
        """Takes what is left out of the engine and has the usage recorded; may be called twice.

        Of a reply that came to its end counts what it told its client. One that was cut off told nobody: it counts
        what the engine had drawn, which is known when the engine has let go of it.
        """
        self._service.running.pop(self.id, None)
        cut = any(reply.finish_reason is None for reply in self.replies)
        self._job.abort()
        if cut:
            self._job.when_released(self._settle)
        else:
            self._settle()

    def _settle(self) -> None:
        with self._lock:
            if self._settled:
                return
            self._settled = True
        tallies: list[Tally] = [
            tally if reply.finish_reason is None else reply.accounts
            for reply, tally in zip(self.replies, self._job.tallies, strict=True)
        ]
        totals = totals_of(self._lengths, tallies)
        self._service.count(totals, time.monotonic() - self._started)
        if self._service.meter is not None:
            model = self._service.config.model_name
            self._service.meter.write(totals.record(self.requests[0], tallies, self.id, model))
