"""Checkpoints in parts: every rank writes what it holds of a spread model, any layout reads it (torch's DCP).

A save goes to a folder beside and is renamed when all ranks are done, so that a kill at any moment leaves the last
complete one.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pensar.base.errors import RunError
from pensar.base.ranks import World

WHOLE = "checkpoint.pt"
"""The checkpoint of a model that every rank has whole."""
_PREFIX = "sharded-"
_DRAFT = ".sharded.tmp"
_EXTRA = "extra.pt"
_AVERAGE = "average"


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Tensor]: ...


def save(
    folder: Path, model: nn.Module, optimizer: Stateful, step: int, world: World, extra: dict[str, Any]
) -> None:
    """All ranks of torch's default group write their parts.

    `step` is the number of finished steps; `extra` is what else the stage needs to go on, equal on all ranks but for
    the parts of an average of the weights. Raises RunError on every rank when one cannot write.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    draft, place = folder / _DRAFT, folder / f"{_PREFIX}{step:08d}"
    if world.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
    world.barrier()
    average = dict(extra.get(_AVERAGE) or {})
    mean: dict[str, Tensor] = average.pop("mean", {})
    failed = ""
    try:
        save_parts(_tensors(model, optimizer, mean), checkpoint_id=draft)
    except Exception as error:  # noqa: BLE001 - the library wraps whatever its writers raise
        failed = f"cannot write the checkpoint {draft}: {error}; free disk space and run again"
    names = sorted({name for held in world.gather(sorted(mean)) for name in held})
    for text in filter(None, world.gather(failed)):
        raise RunError(text)
    if world.rank == 0:
        if average:
            extra = extra | {_AVERAGE: average | {"mean": names}}
        torch.save({"step": step, "extra": extra}, draft / _EXTRA)
        older = _complete(folder)
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
        for path in older:
            if path != place:
                shutil.rmtree(path)
        (folder / WHOLE).unlink(missing_ok=True)
    world.barrier()


def resume(folder: Path, model: nn.Module, optimizer: Stateful, world: World) -> tuple[int, dict[str, Any]]:
    """Loads the last complete checkpoint, whatever layout wrote it; (finished steps, extra), or (0, {}) without one."""
    found = world.broadcast(_complete(folder)[-1:])
    if found:
        return _load(found[0], model, optimizer, alone=False)
    if not world.broadcast((folder / WHOLE).exists()):
        return 0, {}
    return _cut(folder / WHOLE, model, optimizer)


def resume_whole(folder: Path, model: nn.Module, optimizer: Stateful) -> tuple[int, dict[str, Any]]:
    """Loads all parts of the last complete checkpoint into a model that this rank has whole."""
    found = _complete(folder)[-1:]
    return _load(found[0], model, optimizer, alone=True) if found else (0, {})


def remove(folder: Path) -> None:
    """Removes the checkpoints in parts, complete or not."""
    for path in [*_complete(folder), folder / _DRAFT]:
        shutil.rmtree(path, ignore_errors=True)


def _load(place: Path, model: nn.Module, optimizer: Stateful, *, alone: bool) -> tuple[int, dict[str, Any]]:
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    content = torch.load(place / _EXTRA, map_location="cpu", weights_only=True)
    extra: dict[str, Any] = content["extra"]
    names = (extra.get(_AVERAGE) or {}).get("mean", [])
    held = dict(model.named_parameters())
    mean = {name: torch.zeros_like(held[name].detach()) for name in names if name in held}
    with warnings.catch_warnings():
        if alone:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load_parts(_tensors(model, optimizer, mean), checkpoint_id=place, no_dist=alone)
    if names:
        extra = extra | {_AVERAGE: extra[_AVERAGE] | {"mean": mean}}
    return int(content["step"]), extra


def _cut(path: Path, model: nn.Module, optimizer: Stateful) -> tuple[int, dict[str, Any]]:
    """Takes this rank's parts out of a whole checkpoint."""
    from pensar.train.parallel.parts import like, local_of, window_of

    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in held.items():
            local_of(parameter).copy_(content["model"][name][window_of(parameter)])
        for name, tensor in optimizer.state_dict().items():
            local_of(tensor).copy_(content["optimizer"][name][window_of(tensor)])
    extra: dict[str, Any] = content["extra"]
    average = extra.get(_AVERAGE) or {}
    if average.get("mean"):
        whole = {name: mean for name, mean in average["mean"].items() if name in held}
        parts = {name: like(held[name], mean[window_of(held[name])].clone()) for name, mean in whole.items()}
        extra = extra | {_AVERAGE: average | {"mean": parts}}
    return int(content["step"]), extra


def _tensors(model: nn.Module, optimizer: Stateful, mean: Mapping[str, Tensor]) -> dict[str, Any]:
    """Everything by name; the tensors share memory with what they are loaded into."""
    named = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    named |= {f"optimizer.{name}": value for name, value in optimizer.state_dict().items()}
    return named | {f"{_AVERAGE}.{name}": value for name, value in mean.items()}


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints from the oldest on: one unless a kill came between writing and cleaning up."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / _EXTRA).exists())
