"""The training loop: steps, metrics and checkpoints, from wherever a crash left it."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from pensar.base.config import Config
from pensar.base.metrics import Metrics
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train import checkpoint
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.schedule import ScheduleConfig, rate
from pensar.train.step import train_step

BatchesOf = Callable[[int], list[Batch]]
"""Step -> its micro-batches: a pure function, so that any step can be run again."""


class LoopConfig(Config, frozen=True, kw_only=True):
    """What every stage that trains has in common."""

    steps: int
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    checkpoint_every: int = 50


@dataclass(frozen=True)
class Place:
    """Where one rank of a stage works: the artifact's draft, the log folder, and what shows progress."""

    out: Path
    logs: Path
    world: World
    progress: Progress

    def metrics(self) -> Metrics | None:
        """Rank 0 writes metrics."""
        return Metrics(self.out, self.logs) if self.world.rank == 0 else None


def fit(
    model: Qwen3,
    batches_of: BatchesOf,
    config: LoopConfig,
    place: Place,
    *,
    name: str,
    teacher: Qwen3 | None = None,
) -> None:
    """Trains for `config.steps` steps; a killed run goes on from its last checkpoint with the same result."""
    optimizer = Optimizer(model, config.optimizer)
    first, _ = checkpoint.resume(place.out, model, optimizer)
    model.train()
    with place.metrics() or nullcontext() as metrics, place.progress.track(name, config.steps) as progress:
        if metrics:
            metrics.rewind(first - 1)
        progress.advance(first)
        for step in range(first, config.steps):
            started = time.perf_counter()
            scale = rate(config.schedule, step, config.steps)
            values = train_step(model, optimizer, batches_of(step), scale, place.world, config.loss, teacher)
            if metrics:
                metrics.log(step, **values, lr=scale * config.optimizer.lr)
                seconds = time.perf_counter() - started
                metrics.timing(step, seconds=seconds, tokens_per_second=values["tokens"] / seconds)
            progress.advance(1, **{key: values[key] for key in ("loss", "divergence") if key in values})
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                checkpoint.save(place.out, model, optimizer, step + 1, place.world)
    model.eval()
