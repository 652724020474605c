"""Steps of training that the tests run on one rank and on several; workers must be able to import them."""

from typing import Any

import torch

from pensar.base.ranks import World
from pensar.text.packing import Batch
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import train_step
from tiny import parameters_of, tiny_model


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
