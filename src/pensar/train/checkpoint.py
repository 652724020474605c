"""Checkpoints of a stage in progress: model, optimiser and step in one file, written beside and renamed.

A stage that goes on with another layout reads the checkpoint of the former, in either direction.
"""

import os
from pathlib import Path
from typing import Any

import torch

from pensar.base.errors import RunError
from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.train import sharded
from pensar.train.optimizer import Optimizer

NAME = sharded.WHOLE


def save(folder: Path, model: Qwen3, optimizer: Optimizer, step: int, world: World, **extra: Any) -> None:
    """Rank 0 writes; `step` is the number of finished steps, `extra` whatever else the stage needs to go on."""
    if world.rank == 0:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "extra": extra,
        }
        draft = folder / f".{NAME}.tmp"
        try:
            with draft.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch's zip writer reports a full disk as a RuntimeError without its cause
            raise RunError(
                f"cannot write the checkpoint {draft}: {error}; free disk space and run again"
            ) from error
        draft.replace(folder / NAME)
        sharded.remove(folder)
    world.barrier()


def resume(folder: Path, model: Qwen3, optimizer: Optimizer) -> tuple[int, dict[str, Any]]:
    """Loads the last complete checkpoint if there is one; returns the number of finished steps and the extras."""
    path = folder / NAME
    if not path.exists():
        return sharded.resume_whole(folder, model, optimizer)
    state = read(path)
    model.load_state_dict(state["model"])
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
        sharded.remove(folder)
