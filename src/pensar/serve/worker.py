"""Worker: the one thread that steps the engine, and the bridge from it to the server's event loop.

All clients share the engine's running batch. A request enters as a `Job` (one sequence per wanted choice); the thread
posts each step's pieces to the jobs' mailboxes, and the event loop reads them. Whatever goes wrong with one request
stays with it; only an error of the shared step itself ends every sequence that was in the batch. What has to be done to
the engine between two steps is done on its thread as well (`call`).
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pensar.base.errors import ModelError, RunError
from pensar.infer.engine import Engine, Piece, Request
from pensar.infer.request import FinishReason
from pensar.serve.failure import ApiError, draining, engine_failed, invalid, queue_full
from pensar.serve.tally import Tally

log = logging.getLogger(__name__)

Result = TypeVar("Result")

IDLE_SECONDS = 1.0
"""How often an idle thread shows that it is alive."""


@dataclass(frozen=True, slots=True)
class Part:
    """What the engine made for one choice in one step."""

    index: int
    piece: Piece


class Job:
    """One client's request: read `next` until every choice has finished, or `abort`."""

    def __init__(self, worker: "Worker", ids: Sequence[str], loop: asyncio.AbstractEventLoop) -> None:
        self._worker = worker
        self._loop = loop
        self._index = {name: index for index, name in enumerate(ids)}
        self._open = dict.fromkeys(ids)
        self._mailbox: list[Part | ApiError] = []
        self._filled = asyncio.Event()
        self.tallies = [Tally() for _ in ids]
        """Of each choice, kept by the engine's thread; final once it has left the engine."""
        self._inside = len(ids)
        self._released: Callable[[], None] | None = None
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        """Whether every choice has finished and was read."""
        return not self._open and not self._mailbox

    async def next(self, timeout_seconds: float | None = None) -> list[Part]:
        """The parts that arrived since the last call, at least one; empty when `timeout_seconds` passed first.

        Raises ApiError when the engine failed on this request.
        """
        if not self._mailbox:
            self._filled.clear()
            try:
                # Not wait_for, which before Python 3.12 loses a cancellation that comes together with mail.
                async with asyncio.timeout(timeout_seconds):
                    await self._filled.wait()
            except TimeoutError:
                return []
        parts: list[Part] = []
        mail, self._mailbox = self._mailbox, []
        for item in mail:
            if isinstance(item, ApiError):
                raise item
            parts.append(item)
        return parts

    def abort(self, index: int | None = None) -> None:
        """Takes one choice (or all that are left) out of the engine; does not wait, may be called twice."""
        names = [name for name in self._open if index is None or self._index[name] == index]
        for name in names:
            del self._open[name]
        self._worker.abort(names)

    def when_released(self, callback: Callable[[], None]) -> None:
        """Calls back once no choice is in the engine any more: now if that is so, or else on the engine's thread."""
        with self._lock:
            if self._inside:
                self._released = callback
                return
        callback()

    def tally(self, name: str) -> Tally:
        return self.tallies[self._index[name]]

    def left(self, name: str, reason: FinishReason) -> None:
        """Called by the engine's thread when a choice has left the engine."""
        self.tally(name).finish_reason = reason
        with self._lock:
            self._inside -= 1
            callback = None if self._inside else self._released
        if callback is not None:
            callback()

    def post(self, items: Sequence[tuple[str, Piece | ApiError]]) -> None:
        """Called by the engine's thread; the mail is put into the box on the event loop."""
        try:
            self._loop.call_soon_threadsafe(self._receive, items)
        except RuntimeError:  # the loop is closed: the server is gone and nobody reads
            log.debug("mail for a closed event loop was dropped")

    def _receive(self, items: Sequence[tuple[str, Piece | ApiError]]) -> None:
        for name, item in items:
            if name not in self._open:
                continue  # aborted while this step ran
            if isinstance(item, ApiError):
                del self._open[name]
                self._mailbox.append(item)
                continue
            self._mailbox.append(Part(self._index[name], item))
            if item.finish_reason is not None:
                del self._open[name]
        self._filled.set()


class Worker:
    """Owns the engine from `start` to `stop`; `submit` and `abort` may be called from any thread."""

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self.on_failure: Callable[[], None] | None = None
        self._changed = threading.Condition()
        self._arrivals: list[tuple[Request, Job]] = []
        self._departures: list[str] = []
        self._errands: list[tuple[Future[Any], Callable[[Engine], Any]]] = []
        self._live: dict[str, Job] = {}
        self.num_unfinished = 0
        self._num_held = 0
        self._stopping = False
        self._refusing = False
        self._ended = False
        self._heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="pensar-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step; sequences that still run get an error."""
        with self._changed:
            self._stopping = self._refusing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def refuse(self) -> None:
        """From now on `submit` raises; what runs goes on."""
        self._refusing = True

    @property
    def refusing(self) -> bool:
        return self._refusing

    @property
    def num_running(self) -> int:
        return min(self.num_unfinished, self._engine.slots)

    @property
    def num_waiting(self) -> int:
        return max(0, self.num_unfinished - self._engine.slots)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def seconds_since_heartbeat(self) -> float:
        return time.monotonic() - self._heartbeat

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything."""
        return self.num_unfinished == 0 and self._num_held == 0

    def submit(self, requests: Sequence[Request], *, held: bool = False) -> Job:
        """Queues one sequence per choice, each with an id of its own; must run on the event loop that reads the job.

        Raises ApiError: 429 when `max_waiting` sequences wait already, 503 when the server is closing; neither for
        what goes on with a request that was let in before (`held`).
        """
        with self._changed:
            if self._ended or (self._refusing and not held):
                raise draining()
            if self.num_unfinished >= self._engine.slots + self._max_waiting and not held:
                raise queue_full(self.num_waiting, self._max_waiting)
            self.num_unfinished += len(requests)
            job = Job(self, [request.id for request in requests], asyncio.get_running_loop())
            self._arrivals.extend((request, job) for request in requests)
            self._changed.notify()
        return job

    @contextmanager
    def held(self) -> Iterator[None]:
        """For a request that is in the engine again and again: the server does not end between two times."""
        with self._changed:
            self._num_held += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_held -= 1

    def call(self, work: Callable[[Engine], Result]) -> "asyncio.Future[Result]":
        """The result of `work`, which is done on the engine's thread between two steps; ApiError (503) at the end."""
        future: Future[Result] = Future()
        with self._changed:
            if self._ended:
                raise draining()
            self._errands.append((future, work))
            self._changed.notify()
        return asyncio.wrap_future(future)

    def abort(self, names: Sequence[str]) -> None:
        """Takes sequences out of the engine before its next step."""
        if names:
            with self._changed:
                self._departures.extend(names)
                self._changed.notify()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        error = engine_failed("the engine's thread has ended; see the server's log")
        reason: FinishReason = "error"
        try:
            while self._take_mail():
                if self._live:
                    self._step()
            error, reason = draining(), "abort"
            for name in self._live:
                self._drop(name)
        finally:
            # Also when the thread dies of a fault of ours: nobody may wait for it for ever.
            with self._changed:
                self._refusing = self._ended = True
                self._live.update((request.id, job) for request, job in self._arrivals)
                errands, self._errands = self._errands, []
            for future, _ in errands:
                _settle(future, error)
            self._fail_all(error, reason)

    def _take_mail(self) -> bool:
        """Waits for something to do and carries out what was asked for; False when it is time to end."""
        with self._changed:
            self._heartbeat = time.monotonic()
            while not (self._live or self._arrivals or self._departures or self._errands or self._stopping):
                self._changed.wait(IDLE_SECONDS)
                self._heartbeat = time.monotonic()
            if self._stopping:
                return False
            arrivals, self._arrivals = self._arrivals, []
            departures, self._departures = self._departures, []
            errands, self._errands = self._errands, []
        for request, job in arrivals:
            self._admit(request, job)
        for name in departures:
            if name in self._live:
                self._drop(name)
                self._finish(1)
                self._live.pop(name).left(name, "abort")
        for future, work in errands:
            try:
                _settle(future, work(self._engine))
            except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
                _settle(future, error)
        return True

    def _admit(self, request: Request, job: Job) -> None:
        try:
            self._engine.submit(request)
        except Exception as error:  # noqa: BLE001 - any refusal belongs to this request alone
            self._finish(1)
            job.left(request.id, "error")
            theirs = isinstance(error, ModelError)
            job.post([(request.id, invalid(f"{error}.") if theirs else engine_failed(str(error)))])
        else:
            self._live[request.id] = job

    def _drop(self, name: str) -> None:
        """Takes a live sequence out of the engine and notes what it has used."""
        completion = self._engine.abort(name)
        if completion is not None:
            self._live[name].tally(name).settle(completion)

    def _step(self) -> None:
        try:
            pieces = self._engine.step()
        except Exception as error:
            log.exception("an engine step failed; the sequences of its batch are given up")
            if self.on_failure is not None:
                self.on_failure()
            for name in self._live:
                self._drop(name)
            text = "a step of the shared batch raised an error; see the server's log"
            self._fail_all(engine_failed(text), "error")
            if isinstance(
                error, RunError
            ):  # of the engine itself, as when one of its ranks has died: no step will do
                with self._changed:
                    self._stopping = self._refusing = True
            return
        mail: dict[Job, list[tuple[str, Piece | ApiError]]] = {}
        finished: list[tuple[Job, str, FinishReason]] = []
        for piece in pieces:
            job = self._live[piece.id]
            job.tally(piece.id).add(piece)
            failed = piece.finish_reason == "error"
            item = engine_failed(piece.error or "no reason given") if failed else piece
            mail.setdefault(job, []).append((piece.id, item))
            if piece.finish_reason is not None:
                del self._live[piece.id]
                finished.append((job, piece.id, piece.finish_reason))
        self._finish(len(finished))
        for job, name, reason in finished:
            job.left(name, reason)
        for job, items in mail.items():
            job.post(items)

    def _fail_all(self, error: ApiError, reason: FinishReason) -> None:
        live, self._live = self._live, {}
        self._finish(len(live))
        for name, job in live.items():
            job.left(name, reason)
            job.post([(name, error)])

    def _finish(self, count: int) -> None:
        with self._changed:
            self.num_unfinished -= count


def _settle(future: "Future[Any]", result: Any) -> None:
    """Gives somebody a result or an error, unless they have stopped waiting."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
