"""Saver: every rank writes what it holds of a spread model beside training, and rank 0 makes the whole complete.

Who writes what is planned by torch's DCP, once; what is written is a copy. A save goes to a folder beside and is
renamed when all ranks are done, so that a kill at any moment leaves the last complete checkpoint.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from pensar.base.errors import RunError
from pensar.base.ranks import World
from pensar.train.background import Background, copied
from pensar.train.parallel.parts import local_of
from pensar.train.sharded import AVERAGE, DRAFT, EXTRA, PREFIX, WHOLE, Stateful, complete, tensors_of


@dataclass(frozen=True)
class _Plan:
    """Who writes what: a part that several ranks hold is written by one of them."""

    names: tuple[str, ...]
    """Of all tensors of this rank; the plan holds as long as they are the same on every rank."""
    mine: SavePlan
    metadata: Metadata | None
    """Of the whole, on rank 0."""


class Saver:
    """Saves the parts of one model, time and again."""

    def __init__(self, model: nn.Module, optimizer: Stateful) -> None:
        self._model, self._optimizer = model, optimizer
        self._plan: _Plan | None = None

    def begin(self, folder: Path, step: int, extra: dict[str, Any], background: Background) -> None:
        """Copies this rank's parts and begins to write them; all ranks of torch's default group must come here.

        `step` is the number of finished steps; `extra` is what else the stage needs to go on, equal on all ranks but
        for the parts of an average of the weights. `background` raises RunError on every rank when one cannot write.
        """
        background.wait()
        draft, world = folder / DRAFT, background.world
        if world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        average = dict(extra.get(AVERAGE) or {})
        mean: dict[str, Tensor] = average.pop("mean", {})
        names = sorted({name for held in world.gather(sorted(mean)) for name in held})
        if average:
            extra = extra | {AVERAGE: average | {"mean": names}}
        tensors = tensors_of(self._model, self._optimizer, mean)
        plan = self._planned(tensors, draft, world)
        held = background.copies.of({name: local_of(tensors[name]) for name in _written(plan)})
        work = partial(_write, draft, plan.mine, held)
        background.start(
            work, partial(_publish, folder, plan.metadata, {"step": step, "extra": copied(extra)})
        )

    def _planned(self, tensors: dict[str, Any], draft: Path, world: World) -> _Plan:
        """The plan of the save before, or a new one where any rank has other tensors."""
        names, plan = tuple(tensors), self._plan
        if plan is None or any(world.gather(plan.names != names)):
            plan = self._plan = _agreed(tensors, draft, world)
        return plan


class _Planner(DefaultSavePlanner):
    """Finds what is to be written among copies of it."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._held = held

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._held[index.fqn]


def _agreed(tensors: dict[str, Any], draft: Path, world: World) -> _Plan:
    """The plan of all ranks; rank 0 makes it out of what each has."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=world.rank == 0)
    everyone = world.gather(planner.create_local_plan())
    plans: list[SavePlan] = []
    metadata = None
    if world.rank == 0:
        plans, metadata = planner.create_global_plan(everyone)
        plans = FileSystemWriter(draft).prepare_global_plan(plans)
    return _Plan(tuple(tensors), world.broadcast(plans)[world.rank], metadata)


def _written(plan: _Plan) -> list[str]:
    return sorted({item.index.fqn for item in plan.mine.items})


def _write(draft: Path, plan: SavePlan, held: Mapping[str, Tensor]) -> Any:
    """Writes this rank's parts; returns where in its file each of them is."""
    try:
        draft.mkdir(parents=True, exist_ok=True)
        writes = FileSystemWriter(draft, per_thread_copy_ahead=0).write_data(plan, _Planner(held))
        return writes.value()
    except Exception as error:
        # the library wraps whatever its writers raise
        raise RunError(
            f"cannot write the checkpoint {draft}: {error}; free disk space and run again"
        ) from error


def _publish(folder: Path, metadata: Metadata | None, content: dict[str, Any], writes: list[Any]) -> None:
    """Makes a draft whose parts are all there the last complete checkpoint, and removes those before it."""
    assert metadata is not None
    draft, place = folder / DRAFT, folder / f"{PREFIX}{content['step']:08d}"
    try:
        FileSystemWriter(draft).finish(metadata, writes)
        with (draft / EXTRA).open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        older = complete(folder)
        while place.exists():  # of the same step: it counts until the new one does
            place = place.with_name(place.name + "+")
        draft.rename(place)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"cannot write the checkpoint {draft}: {error}; free disk space and run again"
        ) from error
    for path in older:
        (path / EXTRA).unlink(missing_ok=True)
        shutil.rmtree(path)
    (folder / WHOLE).unlink(missing_ok=True)
