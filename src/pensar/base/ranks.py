"""Ranks: the processes of one machine that share a stage's work and sum their tensors over gloo.

Rank 0 is the calling process, so `crew.call` reads like a function call; with one rank it is one.
"""

import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pensar.base.errors import ConfigError, PensarError, RunError
from pensar.base.usage import ResourceUse, reset_peak, usage_now

if TYPE_CHECKING:
    import torch

PATIENCE = datetime.timedelta(days=7)
"""A collective may wait this long: rank 0 may be busy alone for hours, and a dead rank closes its sockets at once."""
GRACE_SECONDS = 1.0
"""How long to wait for a worker's own account of a failure that rank 0 only saw as a closed connection."""
T = TypeVar("T")
Connection = multiprocessing.connection.Connection


class World:
    """The ranks as one of them sees them: its number, their count, and how they exchange values."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group

    @property
    def group(self) -> Any:
        """The process group behind it; None for one rank alone."""
        return self._group

    def all_reduce_(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Replaces `tensor` (same shape and type on every rank) by its sum over the ranks."""
        if self.size > 1:
            self._group.allreduce([tensor]).wait()
        return tensor

    def gather(self, obj: T) -> list[T]:
        """What every rank gave, in order of rank, on every rank; anything that pickles."""
        if self.size == 1:
            return [obj]
        import torch

        data = _to_bytes(obj)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._group.allgather([sizes], [torch.tensor([len(data)])]).wait()
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._group.allgather([parts], [padded]).wait()
        return [
            cast(T, pickle.loads(part[: int(size)].numpy().tobytes()))
            for part, size in zip(parts, sizes, strict=True)
        ]

    def dealt(self, mine: Sequence[T]) -> list[T]:
        """All of what was dealt out to the ranks in turn, `everything[rank::size]` to each, in its first order."""
        parts = self.gather(list(mine))
        return [parts[n % self.size][n // self.size] for n in range(sum(map(len, parts)))]

    def broadcast(self, obj: T) -> T:
        """What rank 0 gave, on every rank."""
        if self.size == 1:
            return obj
        import torch

        data = _to_bytes(obj) if self.rank == 0 else torch.zeros(0, dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self._group.broadcast(size, 0).wait()
        if self.rank != 0:
            data = torch.zeros(int(size), dtype=torch.uint8)
        self._group.broadcast(data, 0).wait()
        return obj if self.rank == 0 else cast(T, pickle.loads(data.numpy().tobytes()))

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            self._group.barrier().wait()


@dataclass(frozen=True)
class _Failure:
    """A worker's last words; `moment` tells the cause from the failures that follow it."""

    rank: int
    moment: float
    error: BaseException


@dataclass(frozen=True)
class _Worker:
    process: Any
    pipe: Connection


class Crew:
    """Runs functions on `ranks` processes of `threads` threads each; the workers live until `close`.

    They start at the first call, end with this process even when it is killed, and after a failure are started
    anew by the next call. A crew that crosses into another process arrives as a crew of one.
    """

    def __init__(self, ranks: int = 1, threads: int = 1) -> None:
        if ranks < 1 or threads < 1:
            raise ConfigError(f"{ranks} ranks of {threads} threads: both must be at least 1")
        self.ranks = ranks
        self.threads = threads
        self._workers: list[_Worker] = []
        self._group: Any = None

    def call(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(world, *args)` on every rank; the result of rank 0.

        `fn` must be defined at the top of a module and `args` must pickle. An exception on any rank is raised
        here, the earliest one where several ranks failed; RunError if a rank was killed.
        """
        before = _set_threads(self.threads)
        try:
            if self.ranks == 1:
                return fn(World(), *args)
            return self._call_all(fn, args)
        finally:
            if before is not None:
                _set_threads(before)

    def usage(self) -> dict[int, ResourceUse]:
        """CPU-seconds and peak memory of every rank by process id, of rank 0 alone if no worker runs."""
        if not self._workers:
            return {os.getpid(): usage_now()}
        return dict(self.call(_gather_usage))

    def reset_peaks(self) -> None:
        """Starts the peak memory of every rank anew."""
        if self._workers:
            self.call(_reset_peak)
        else:
            reset_peak()

    def close(self) -> None:
        """Ends the workers; the crew may be used again and then starts new ones."""
        self._group = None
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["Crew"], tuple[()]]:
        return Crew, ()

    def _call_all(self, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
        payload = pickle.dumps((fn, args))
        try:
            if not self._workers:
                self._start()
            for worker in self._workers:
                worker.pipe.send_bytes(payload)
            result = fn(World(0, self.ranks, self._group), *args)
            failures = self._failures(wait=True)
        except BaseException as error:
            moment = time.monotonic()
            known = isinstance(error, Exception)
            failures = [f for f in self._failures(wait=False) if f.moment < moment] if known else []
            self.close()
            if not failures:
                raise
            raise min(failures, key=lambda failure: failure.moment).error from error
        if failures:
            self.close()
            raise min(failures, key=lambda failure: failure.moment).error
        return result

    def _failures(self, wait: bool) -> list[_Failure]:
        """The failures among the workers' answers; waits for every answer, or only as long as a failure may lag."""
        failures = []
        open_pipes = {worker.pipe: rank for rank, worker in enumerate(self._workers, start=1)}
        deadline = None if wait else GRACE_SECONDS
        while open_pipes:
            ready = multiprocessing.connection.wait(list(open_pipes), timeout=deadline)
            if not ready:
                break
            for pipe in cast(list[Connection], ready):
                rank = open_pipes.pop(pipe)
                try:
                    answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    answer = _Failure(rank, time.monotonic() - GRACE_SECONDS, self._death(rank))
                if isinstance(answer, _Failure):
                    failures.append(answer)
                    deadline = GRACE_SECONDS
        return failures

    def _death(self, rank: int) -> RunError:
        process = self._workers[rank - 1].process
        process.join(GRACE_SECONDS)
        code = process.exitcode
        why = (
            f"by signal {-code} (9: often for want of memory)"
            if code and code < 0
            else f"with exit code {code}"
        )
        return RunError(
            f"rank {rank} (process {process.pid}) ended {why}; run again, with fewer --ranks if it recurs"
        )

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory(prefix="pensar-ranks-") as folder:
            store = str(Path(folder) / "store")
            for rank in range(1, self.ranks):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(rank, self.ranks, self.threads, store, theirs),
                    daemon=True,
                    name=f"pensar-rank-{rank}",
                )
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
            for rank, worker in enumerate(self._workers, start=1):
                # The first answer says that the worker has come up; a worker that cannot must not hang the rest.
                try:
                    answer = pickle.loads(worker.pipe.recv_bytes())
                except (EOFError, OSError):
                    raise self._death(rank) from None
                if isinstance(answer, _Failure):
                    raise answer.error
            self._group = _connect(0, self.ranks, store)
            self._group.barrier().wait()


def _connect(rank: int, size: int, store: str) -> Any:
    """A process group of its own rather than torch's global one: nothing outside the World can depend on it."""
    import torch.distributed as dist
    from torch.distributed import ProcessGroupGloo

    # The public constructor binds to the host's own name, which need not resolve: take the loopback address.
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]  # noqa: SLF001
    options._timeout = PATIENCE  # noqa: SLF001
    file_store = dist.FileStore(store, size)  # type: ignore[attr-defined]
    return ProcessGroupGloo(file_store, rank, size, options)


def _serve(rank: int, size: int, threads: int, store: str, pipe: Connection) -> None:
    """The life of a worker: one call after the other, until the parent or a call of it fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    sys.stdout = sys.stderr
    try:
        import torch

        torch.set_num_threads(threads)
        pipe.send_bytes(pickle.dumps(None))
        group = _connect(rank, size, store)
        group.barrier().wait()
        world = World(rank, size, group)
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError):
                os._exit(0)
            fn, args = pickle.loads(message)
            fn(world, *args)
            pipe.send_bytes(pickle.dumps(None))
    except BaseException as error:  # noqa: BLE001 - it is raised again by the caller
        pipe.send_bytes(_last_words(rank, error))
        # Leaving at once closes the sockets, which frees the ranks that wait for this one.
        os._exit(1)


def _last_words(rank: int, error: BaseException) -> bytes:
    moment = time.monotonic()
    if not isinstance(error, PensarError):
        error.add_note(f"on rank {rank}:\n" + "".join(traceback.format_exception(error)))
    try:
        data = pickle.dumps(_Failure(rank, moment, error))
        pickle.loads(data)
    except Exception:  # noqa: BLE001 - a class can fail in any way when it is pickled
        # Some exceptions do not survive pickling; their text does.
        text = "".join(traceback.format_exception(error))
        return pickle.dumps(_Failure(rank, moment, RunError(f"rank {rank} failed:\n{text}")))
    return data


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        # The sentinel is a pipe whose other end only the parent holds: it closes even on kill -9.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _to_bytes(obj: object) -> "torch.Tensor":
    import torch

    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)


def _set_threads(threads: int) -> int | None:
    """Sets torch's threads if torch is loaded at all, and returns how many there were."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    before = int(torch.get_num_threads())
    torch.set_num_threads(threads)
    return before


def _gather_usage(world: World) -> list[tuple[int, ResourceUse]]:
    return world.gather((os.getpid(), usage_now()))


def _reset_peak(world: World) -> None:
    reset_peak()
    world.barrier()
