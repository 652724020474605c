"""Observed training that the tests run on one rank and on several; workers must be able to import it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pensar.base.files import read_jsonl
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.text.packing import Batch
from pensar.train.groups import Groups
from pensar.train.layout import parse_layout
from pensar.train.loop import LoopConfig, Place, fit
from pensar.train.optimizer import OptimizerConfig
from pensar.train.parallel.run import opened_mesh, spread_model
from pensar.train.parallel.shard import from_tensors
from tiny import tiny_model

DOCUMENTS = pa.table(
    {
        "domain": ["web", "books", "web", ""],
        "language": ["eng_Latn", "por_Latn", "por_Latn", "eng_Latn"],
        "source": ["a", "a", "b", "b"],
        "kind": ["text"] * 4,
    }
)
Rows = list[dict[str, Any]]


def batches(step: int, rows: int = 4, width: int = 16, micro_batches: int = 1) -> list[Batch]:
    """Two documents a row, the border elsewhere in every row, each of one of four groups."""
    rng = np.random.default_rng(step)
    made = []
    for _ in range(micro_batches):
        tokens = rng.integers(1, 300, (rows, width)).astype(np.int32)
        border = rng.integers(3, width - 3, (rows, 1))
        columns = np.arange(width)[None, :]
        positions = np.where(columns < border, columns, columns - border).astype(np.int32)
        first, second = rng.integers(0, 4, (2, rows, 1))
        made.append(
            Batch(
                tokens=tokens,
                positions=positions,
                segments=np.where(columns < border, 1, 2).astype(np.int32),
                ce=(positions != 0).astype(np.float32),
                groups=np.where(columns < border, first, second).astype(np.int32),
                num_groups=4,
            )
        )
    return made


def observed(
    world: World, layout: str, changes: dict[str, Any], folder: Path, settings: dict[str, Any]
) -> tuple[Rows, Rows]:
    """The rows of losses and of layers of a stage of six steps."""
    optimizer = OptimizerConfig(weight_decay=0.1)
    config = LoopConfig(steps=6, optimizer=optimizer, **{"losses_every": 4, "observe_every": 3, **settings})
    model = tiny_model(**changes)
    place = Place(folder, folder.with_name(folder.name + "-logs"), world, Progress())
    groups = Groups(DOCUMENTS)
    if layout:
        with opened_mesh(world, parse_layout(layout)) as mesh:
            spread = spread_model(model.config, mesh, from_tensors(model.state_dict()))
            place = Place(place.out, place.logs, world, Progress(), mesh)
            fit(spread, batches, config, place, name="observed", groups=groups)
    else:
        fit(model, batches, config, place, name="observed", groups=groups)
    names = ("losses", "layers")
    files = [folder / f"{name}.jsonl" for name in names]
    losses, layers = (list(read_jsonl(file, dict)) if file.exists() else [] for file in files)
    return losses, layers


def flat(row: Any, path: str = "") -> dict[str, float]:
    """Nested values by path."""
    entries = row.items() if isinstance(row, dict) else enumerate(row)
    found: dict[str, float] = {}
    for name, value in entries:
        key = f"{path}/{name}"
        found |= flat(value, key) if isinstance(value, dict | list) else {key: float(value)}
    return found


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).norm())
