"""Steps of training that the tests run on one rank and on several; workers must be able to import them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.text.packing import Batch
from pensar.train.loop import LoopConfig, Place, fit
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import train_step
from tiny import parameters_of, tiny_model


def gradient(
    world: World, changes: dict[str, Any], batches: list[Batch], config: LossConfig, dtype: torch.dtype
) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics of one step and its gradient, as summed over ranks and micro-batches, before the update."""
    model = tiny_model(**changes).to(dtype)
    optimizer = Optimizer(model, OptimizerConfig(muon=False, clip_norm=1e30))
    found: list[torch.Tensor] = []

    def judge(_: Mapping[str, float]) -> None:
        found.append(torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None]))

    metrics = train_step(model, optimizer, batches, 1.0, world, config, judge=judge)
    return metrics, found[0]


def fitted(world: World, batches: list[Batch], config: LoopConfig, folder: Path) -> torch.Tensor:
    """The parameters after a whole stage, the same on all ranks."""
    model = tiny_model()
    place = Place(folder, folder.with_name(folder.name + "-logs"), world, Progress())
    fit(model, lambda step: [batches[step]], config, place, name="work")
    vectors = world.gather(parameters_of(model).numpy())
    assert all((vector == vectors[0]).all() for vector in vectors), "ranks have drifted apart"
    return parameters_of(model)


def steps(
    world: World,
    changes: dict[str, Any],
    steps: list[list[Batch]],
    config: LossConfig,
    optimizer_config: OptimizerConfig,
    with_teacher: bool,
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Metrics of every step and the parameters after the last."""
    model = tiny_model(**changes)
    teacher = tiny_model(seed=9, **changes).eval() if with_teacher else None
    optimizer = Optimizer(model, optimizer_config)
    metrics = [train_step(model, optimizer, batches, 1.0, world, config, teacher) for batches in steps]
    vectors = world.gather(parameters_of(model).numpy())
    assert all((vector == vectors[0]).all() for vector in vectors), "ranks have drifted apart"
    return metrics, parameters_of(model)
