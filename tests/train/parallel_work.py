"""Training over a mesh that the tests run on several ranks; workers must be able to import it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pensar.base.files import seed_of
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import opened_weights
from pensar.text.packing import Batch
from pensar.train.arithmetic import compiled
from pensar.train.average import AverageConfig
from pensar.train.guard import GuardConfig
from pensar.train.layout import parse_layout
from pensar.train.loop import LoopConfig, Place, fit
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.parallel.optimizer import ShardedOptimizer
from pensar.train.parallel.parts import like, window_of
from pensar.train.parallel.run import gathered_model, opened_mesh, spread_model
from pensar.train.parallel.shard import from_seed, from_tensors
from pensar.train.parallel.step import Meshed
from pensar.train.recompute import Recompute, recomputed
from pensar.train.step import train_step
from tiny import tiny_model

Weights = dict[str, torch.Tensor]
Metrics = list[dict[str, float]]


def batches(step: int, rows: int, micro_batches: int = 1, width: int = 16) -> list[Batch]:
    """Two documents a row, the border elsewhere in every row, and some padding."""
    rng = np.random.default_rng(step)
    made = []
    for _ in range(micro_batches):
        tokens = rng.integers(1, 300, (rows, width)).astype(np.int32)
        border = rng.integers(3, width - 5, (rows, 1))
        columns = np.arange(width)[None, :]
        segments = np.where(columns < border, 1, 2)
        segments[:, width - 2 :] = np.where(rng.random((rows, 1)) < 0.5, 0, segments[:, width - 2 :])
        positions = np.where(columns < border, columns, columns - border)
        ce = (segments != 0) & (positions != 0)
        made.append(
            Batch(
                tokens=tokens,
                positions=positions.astype(np.int32),
                segments=segments.astype(np.int32),
                ce=ce.astype(np.float32),
            )
        )
    return made


def steps(
    world: World,
    layout: str,
    changes: dict[str, Any],
    rows: int,
    micro_batches: int,
    recompute: Recompute = "none",
    compile_: bool = False,
) -> tuple[Metrics, Weights]:
    """Metrics of four steps and the weights after the last; without a layout on every rank the whole model."""
    whole = tiny_model(**changes)
    config = OptimizerConfig(weight_decay=0.1)
    loss = LossConfig(z_loss=1e-3, router_z_loss=1e-2, chunk_tokens=11)
    data = [batches(step, rows, micro_batches) for step in range(4)]
    if not layout:
        optimizer = Optimizer(whole, config)
        return [train_step(whole, optimizer, parts, 1.0, world, loss) for parts in data], weights(whole)
    with opened_mesh(world, parse_layout(layout)) as mesh:
        model = spread_model(whole.config, mesh, from_tensors(whole.state_dict()))
        spread = ShardedOptimizer(model, config, mesh)
        with compiled(model, compile_), recomputed(model, recompute):
            metrics = [train_step(model, spread, parts, 1.0, Meshed(mesh), loss) for parts in data]
        gathered = gathered_model(model, mesh)
        return metrics, weights(gathered) if gathered is not None else {}


def updated(world: World, layout: str, changes: dict[str, Any]) -> tuple[Weights, dict[str, float]]:
    """The weights after two updates by given gradients, and the bytes of this rank's exchanges in the second."""
    whole, config = tiny_model(**changes), OptimizerConfig(lr=0.5, weight_decay=0.1)
    gradients = {
        name: torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed_of(name)))
        for name, parameter in whole.named_parameters()
    }
    if not layout:
        optimizer = Optimizer(whole, config)
        for _ in range(2):
            for name, parameter in whole.named_parameters():
                parameter.grad = gradients[name].clone()
            optimizer.update(1.0, world)
        return weights(whole), {}
    with opened_mesh(world, parse_layout(layout)) as mesh:
        model = spread_model(whole.config, mesh, from_tensors(whole.state_dict()))
        spread, counted = ShardedOptimizer(model, config, mesh), Counted()
        for _ in range(2):
            for name, parameter in model.named_parameters():
                parameter.grad = like(parameter, gradients[name][window_of(parameter)].clone())
            counted.num_bytes.clear()
            with counted:
                spread.update(1.0, mesh.data)
        gathered = gathered_model(model, mesh)
        return weights(gathered) if gathered is not None else {}, dict(counted.num_bytes)


class Counted(TorchDispatchMode):
    """Bytes that collectives are given by this rank, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if op.namespace in ("c10d", "_c10d_functional"):
            given = args[1] if op.namespace == "c10d" else args[0]
            tensors = [tensor for tensor in tree_leaves(given) if isinstance(tensor, torch.Tensor)]
            self.num_bytes[op.name()] += sum(tensor.nbytes for tensor in tensors)
        return op(*args, **(kwargs or {}))


BAD_STEP = 4


class Killed(Exception):
    """What ends a run in the middle of it."""


def stage(
    world: World, layout: str, folder: Path, stop_at: int | None, changes: dict[str, Any] | None = None
) -> Weights:
    """Eight steps of a stage with checkpoints every three, killed before step `stop_at`; the weights at the end.

    The data of step 4 are bad, and left out.
    """
    config = LoopConfig(
        steps=8, checkpoint_every=3, average=AverageConfig(ema=0.5), guard=GuardConfig(on_bad_step="skip")
    )

    def data(step: int) -> list[Batch]:
        if step == stop_at:
            raise Killed
        found = batches(step, rows=4)
        return [replace(batch, ce=batch.ce * np.nan) for batch in found] if step == BAD_STEP else found

    model, place = tiny_model(**(changes or {})), Place(folder, folder / "logs", world, Progress())
    if not layout:
        fit(model, data, config, place, name="test")
        return weights(model)
    with opened_mesh(world, parse_layout(layout)) as mesh:
        spread = spread_model(model.config, mesh, from_tensors(model.state_dict()))
        place = Place(folder, folder / "logs", world, Progress(), mesh)
        fit(spread, data, config, place, name="test")
        gathered = gathered_model(spread, mesh)
        return weights(gathered) if gathered is not None else {}


def weights(model: Qwen3) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def started(world: World, layout: str, folder: Path | None, changes: dict[str, Any]) -> Weights:
    """The weights that every rank begins with, from a folder or from the seed."""
    config = tiny_model(**changes).config
    with opened_mesh(world, parse_layout(layout)) as mesh:
        if folder is None:
            model = spread_model(config, mesh, from_seed(config, 0))
        else:
            with opened_weights(folder) as read:
                model = spread_model(config, mesh, read)
        gathered = gathered_model(model, mesh)
        return weights(gathered) if gathered is not None else {}
