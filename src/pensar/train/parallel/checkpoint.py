"""Checkpoints of a spread model: every rank writes its parts, any other layout reads them (torch's DCP).

A save goes to a folder beside and is renamed when all ranks are done, so that a kill at any moment leaves the last
complete one.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from pensar.base.errors import RunError
from pensar.model.qwen3 import Qwen3
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.optimizer import ShardedOptimizer

_PREFIX = "sharded-"
_DRAFT = ".sharded.tmp"
_EXTRA = "extra.pt"


def save(
    folder: Path, model: Qwen3, optimizer: ShardedOptimizer, step: int, mesh: Mesh, extra: dict[str, Any]
) -> None:
    """All ranks write their parts; `step` is the number of finished steps, `extra` what else there is, equal on all."""
    draft, place = folder / _DRAFT, folder / f"{_PREFIX}{step:08d}"
    if mesh.world.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
    mesh.world.barrier()
    try:
        state_dict_saver.save(_state(model, optimizer), checkpoint_id=draft)
        failed = ""
    except Exception as error:  # noqa: BLE001 - the library wraps whatever its writers raise
        failed = f"cannot write the checkpoint {draft}: {error}; free disk space and run again"
    failures = [text for text in mesh.world.gather(failed) if text]
    if failures:
        raise RunError(failures[0])
    if mesh.world.rank == 0:
        torch.save({"step": step, "extra": extra}, draft / _EXTRA)
        older = _complete(folder)
        if place.exists():
            shutil.rmtree(place)
        draft.rename(place)
        for path in older:
            if path != place:
                shutil.rmtree(path)
    mesh.world.barrier()


def resume(folder: Path, model: Qwen3, optimizer: ShardedOptimizer, mesh: Mesh) -> tuple[int, dict[str, Any]]:
    """Loads the last complete checkpoint, whatever layout wrote it; (finished steps, extra), or (0, {}) without one."""
    found = mesh.world.broadcast(_complete(folder)[-1:])
    if not found:
        return 0, {}
    state_dict_loader.load(_state(model, optimizer), checkpoint_id=found[0])
    content = torch.load(found[0] / _EXTRA, map_location="cpu", weights_only=True)
    return int(content["step"]), content["extra"]


def discard(folder: Path, mesh: Mesh) -> None:
    """Removes the checkpoints of a finished stage."""
    mesh.world.barrier()
    if mesh.world.rank == 0:
        for path in [*_complete(folder), folder / _DRAFT]:
            shutil.rmtree(path, ignore_errors=True)


def _state(model: Qwen3, optimizer: ShardedOptimizer) -> dict[str, Tensor]:
    """Everything by name; the tensors share memory with what they are loaded into."""
    weights = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    return weights | {f"optimizer.{name}": value for name, value in optimizer.state().items()}


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints from the oldest on: one unless a kill came between writing and cleaning up."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / _EXTRA).exists())
