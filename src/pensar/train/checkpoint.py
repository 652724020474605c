"""Checkpoints of a stage in progress: model, optimiser and step in one file, written beside and renamed.

A stage that goes on with another layout reads the checkpoint of the former, in either direction. Training goes on while
one is written: what is written is a copy.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from pensar.base.errors import RunError
from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.train import sharded
from pensar.train.background import Background, copied
from pensar.train.optimizer import Optimizer

if TYPE_CHECKING:
    from pensar.train.parallel.optimizer import ShardedOptimizer

NAME = sharded.WHOLE


class Part(Protocol):
    """Whatever beside model and optimiser must be as it was when a run goes on from a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Saves:
    """A stage's checkpoints as its loop sees them, of a whole or a spread model: begun, looked after, gone back to.

    All ranks make the same calls. What could not be written is a RunError on all of them, at the next of these calls.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        model: Qwen3,
        optimizer: "Optimizer | ShardedOptimizer",
        parts: Mapping[str, Part],
    ) -> None:
        self._folder, self._world, self._parts = folder, world, parts
        self._model, self._optimizer = model, optimizer
        self._background = Background(world)
        self._saver: Any = None
        if not isinstance(optimizer, Optimizer):
            from pensar.train.parallel.saver import Saver

            self._saver = Saver(model, optimizer)

    def begin(self, step: int) -> None:
        """Copies everything as it is after `step` steps, and begins to write it once the save before is done."""
        extra = {name: part.state_dict() for name, part in self._parts.items()}
        if isinstance(self._optimizer, Optimizer):
            begin(self._folder, self._model, self._optimizer, step, self._background, extra)
        else:
            self._saver.begin(self._folder, step, extra, self._background)

    def look(self) -> None:
        """Between two steps: a checkpoint that all ranks have written becomes the last complete one."""
        self._background.look()

    def restore(self) -> int:
        """Everything as the last checkpoint holds it, one under way included; returns the number of finished steps."""
        self._background.wait()
        if isinstance(self._optimizer, Optimizer):
            step, extra = resume(self._folder, self._model, self._optimizer)
        else:
            step, extra = sharded.resume(self._folder, self._model, self._optimizer, self._world)
        for name, part in self._parts.items():
            if name in extra:
                part.load_state_dict(extra[name])
        return step

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.__exit__(kind, error, trace)


def save(folder: Path, model: Qwen3, optimizer: Optimizer, step: int, world: World, **extra: Any) -> None:
    """Rank 0 writes; `step` is the number of finished steps, `extra` whatever else the stage needs to go on."""
    with Background(world) as background:
        begin(folder, model, optimizer, step, background, extra)


def begin(
    folder: Path,
    model: Qwen3,
    optimizer: Optimizer,
    step: int,
    background: Background,
    extra: dict[str, Any],
) -> None:
    """Rank 0 copies the state and begins to write it; `background` raises RunError on all ranks when it cannot."""
    background.wait()
    if background.world.rank != 0:
        background.start(lambda: None)
        return
    named = {f"model.{name}": tensor for name, tensor in _trained(model).items()}
    named |= {f"optimizer.{name}": tensor for name, tensor in optimizer.state_dict().items()}
    state: dict[str, Any] = {"model": {}, "optimizer": {}, "step": step, "extra": copied(extra)}
    for path, tensor in background.copies.of(named).items():
        kind, _, name = path.partition(".")
        state[kind][name] = tensor
    background.start(partial(_write, folder, state))


def resume(folder: Path, model: Qwen3, optimizer: Optimizer) -> tuple[int, dict[str, Any]]:
    """Loads the last complete checkpoint if there is one; returns the number of finished steps and the extras."""
    path = sharded.last(folder)
    if path is None:
        return 0, {}
    if path.name != NAME:
        return sharded.load(path, model, optimizer, alone=True)
    state = read(path)
    for name, tensor in _trained(model).items():
        tensor.copy_(state["model"][name])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), state["extra"]


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint: `model`, `optimizer`, `step` and `extra`."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def discard(folder: Path, world: World) -> None:
    """Removes the checkpoint of a finished stage: the model's own files are the artifact."""
    world.barrier()
    if world.rank == 0:
        (folder / NAME).unlink(missing_ok=True)
        (folder / f".{NAME}.tmp").unlink(missing_ok=True)
        sharded.remove(folder)


def _trained(model: Qwen3) -> dict[str, torch.Tensor]:
    """What training changes, sharing memory with the model: what is frozen comes from the stage's input."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _write(folder: Path, state: dict[str, Any]) -> None:
    draft = folder / f".{NAME}.tmp"
    try:
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        draft.unlink(missing_ok=True)
        # torch's zip writer reports a full disk as a RuntimeError without its cause
        raise RunError(
            f"cannot write the checkpoint {draft}: {error}; free disk space and run again"
        ) from error
    draft.replace(folder / NAME)
    sharded.remove(folder)
