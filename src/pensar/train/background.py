"""Background: what a checkpoint costs beside training: a copy of the state, and a thread that writes it to the disk.

Only the copying stops training. Ranks agree between steps, on the thread that trains, that a piece of work is done
everywhere; a thread in the background never talks to other ranks, so that exchanges of training keep their order.
"""

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from pensar.base.errors import PensarError, RunError
from pensar.base.ranks import World

Work = Callable[[], Any]
Then = Callable[[list[Any]], None]
"""What rank 0 does with the results of all ranks, in order of rank."""


class Copies:
    """Tensors as they were when they were last copied, in the processor's memory; the copies are used again."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of these and of no others; those of the call before are overwritten."""
        self._held = {name: self._fitting(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._held[name].copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._held

    @property
    def num_bytes(self) -> int:
        """What the copies take beside the state itself, from the first checkpoint on."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def _fitting(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
            return held
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")


def copied(value: Any) -> Any:
    """`value` with copies of its containers and tensors, so that it stays what it is now."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return [copied(one) for one in value] if isinstance(value, list) else value


class Background:
    """One piece of work at a time beside training, on every rank; errors are raised on all of them.

    All ranks make the same calls. Leaving it by an error waits for this rank's own thread alone: others may be dead.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.copies = Copies()
        self._open = False
        self._thread: threading.Thread | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._then: Then | None = None

    def start(self, work: Work, then: Then | None = None) -> None:
        """`work` begins on this rank, after what began before; when all ranks are done, `then` likewise on rank 0."""
        self.wait()
        self._open, self._then = True, then
        self._run(work)

    def look(self) -> None:
        """Between two steps: takes note of what all ranks have finished; RunError on all where one has failed."""
        while self._open:
            running = torch.tensor([self._thread is not None and self._thread.is_alive()], dtype=torch.int64)
            if int(self.world.all_reduce_(running)):
                return
            self._settle()

    def wait(self) -> None:
        """Returns when all ranks have finished; RunError on all where one has failed."""
        while self._open:
            self._settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def _run(self, work: Work) -> None:
        def working() -> None:
            try:
                self._result = work()
            except BaseException as error:  # noqa: BLE001 - it is raised again by the thread that trains
                self._error = error

        self._result = self._error = None
        self._thread = threading.Thread(target=working, name="pensar-background", daemon=True)
        self._thread.start()

    def _settle(self) -> None:
        """Ends the work of all ranks and begins what comes then, on rank 0."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread = self._error, None
        answers = self.world.gather((self._result, _text(error)))
        for text in filter(None, (text for _, text in answers)):
            self._open = False
            raise RunError(text) from error
        then, self._then, self._result = self._then, None, None
        self._open = then is not None
        if then is not None and self.world.rank == 0:
            self._run(lambda: then([result for result, _ in answers]))


def _text(error: BaseException | None) -> str:
    if error is None or isinstance(error, PensarError):
        return str(error or "")
    return f"{type(error).__name__}: {error}"
