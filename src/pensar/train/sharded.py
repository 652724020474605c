"""Checkpoints in parts: every rank writes what it holds of a spread model, any layout reads it (torch's DCP).

Which of them are complete, and how they are loaded; `parallel/saver.py` writes them.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pensar.base.ranks import World

WHOLE = "checkpoint.pt"
"""The checkpoint of a model that every rank has whole."""
PREFIX = "sharded-"
DRAFT = ".sharded.tmp"
EXTRA = "extra.pt"
AVERAGE = "average"


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Tensor]: ...


def resume(folder: Path, model: nn.Module, optimizer: Stateful, world: World) -> tuple[int, dict[str, Any]]:
    """Loads the last complete checkpoint, whatever layout wrote it; (finished steps, extra), or (0, {}) without one."""
    path = world.broadcast(last(folder))
    if path is None:
        return 0, {}
    if path.name == WHOLE:
        return _cut(path, model, optimizer)
    return load(path, model, optimizer, alone=False)


def last(folder: Path) -> Path | None:
    """The last complete checkpoint, in parts or whole."""
    whole, parts = folder / WHOLE, complete(folder)
    if whole.exists() and (not parts or _read(whole)["step"] >= _step_of(parts[-1])):
        return whole
    return parts[-1] if parts else None


def remove(folder: Path) -> None:
    """Removes the checkpoints in parts, complete or not."""
    for path in [*complete(folder), folder / DRAFT]:
        (path / EXTRA).unlink(missing_ok=True)  # first: what is removed by half is not complete
        shutil.rmtree(path, ignore_errors=True)


def load(place: Path, model: nn.Module, optimizer: Stateful, *, alone: bool) -> tuple[int, dict[str, Any]]:
    """Loads a complete checkpoint in parts; `alone` into a model that this rank has whole, without the others."""
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    content = _read(place / EXTRA)
    extra: dict[str, Any] = content["extra"]
    average = extra.get(AVERAGE) or {}
    names = average.get("mean", [])
    held = dict(model.named_parameters())
    mean = {name: torch.zeros_like(held[name].detach()) for name in names if name in held}
    with warnings.catch_warnings():
        if alone:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load_parts(tensors_of(model, optimizer, mean), checkpoint_id=place, no_dist=alone)
    if average:
        extra = extra | {AVERAGE: average | {"mean": mean}}
    return int(content["step"]), extra


def _cut(path: Path, model: nn.Module, optimizer: Stateful) -> tuple[int, dict[str, Any]]:
    """Takes this rank's parts out of a whole checkpoint."""
    from pensar.train.parallel.parts import like, local_of, window_of

    content = _read(path)
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in held.items():
            local_of(parameter).copy_(content["model"][name][window_of(parameter)])
        for name, tensor in optimizer.state_dict().items():
            local_of(tensor).copy_(content["optimizer"][name][window_of(tensor)])
    extra: dict[str, Any] = content["extra"]
    average = extra.get(AVERAGE) or {}
    if average.get("mean"):
        whole = {name: mean for name, mean in average["mean"].items() if name in held}
        parts = {name: like(held[name], mean[window_of(held[name])].clone()) for name, mean in whole.items()}
        extra = extra | {AVERAGE: average | {"mean": parts}}
    return int(content["step"]), extra


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def tensors_of(model: nn.Module, optimizer: Stateful, mean: Mapping[str, Tensor]) -> dict[str, Any]:
    """Everything by name; the tensors share memory with what they are loaded into."""
    named = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    named |= {f"optimizer.{name}": value for name, value in optimizer.state_dict().items()}
    return named | {f"{AVERAGE}.{name}": value for name, value in mean.items()}


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints from the oldest on: one unless a kill came between writing and cleaning up."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / EXTRA).exists())


def _step_of(place: Path) -> int:
    return int(place.name.removeprefix(PREFIX).rstrip("+"))
