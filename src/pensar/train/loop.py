"""The training loop: steps, metrics and checkpoints, from wherever a crash left it."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from pensar.base.config import Config
from pensar.base.metrics import Metrics
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import save_model
from pensar.text.packing import Batch
from pensar.text.tokenizer import Tokenizer
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


def loop(
    model: Qwen3,
    optimizer: Optimizer,
    config: LoopConfig,
    place: Place,
    take: Callable[[int], dict[str, float]],
    *,
    name: str,
    shown: Sequence[str],
    on_start: Callable[[int], None] | None = None,
) -> None:
    """Takes `config.steps` steps; a killed run goes on from its last checkpoint with the same result.

    `take(step)` updates the model and returns the step's metrics, `tokens` among them; `shown` names those beside the
    progress bar. `on_start(first)` is called on rank 0 with the step that this attempt begins at.
    """
    first, _ = checkpoint.resume(place.out, model, optimizer)
    with place.metrics() or nullcontext() as metrics, place.progress.track(name, config.steps) as progress:
        if metrics:
            metrics.rewind(first - 1)
            if on_start:
                on_start(first)
        progress.advance(first)
        for step in range(first, config.steps):
            started = time.perf_counter()
            values = take(step)
            if metrics:
                metrics.log(step, **values)
                seconds = time.perf_counter() - started
                metrics.timing(step, seconds=seconds, tokens_per_second=values["tokens"] / seconds)
            progress.advance(1, **{key: values[key] for key in shown if key in values})
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                checkpoint.save(place.out, model, optimizer, step + 1, place.world)


def fit(
    model: Qwen3,
    batches_of: BatchesOf,
    config: LoopConfig,
    place: Place,
    *,
    name: str,
    teacher: Qwen3 | None = None,
) -> None:
    """Trains on given batches."""
    optimizer = Optimizer(model, config.optimizer)

    def take(step: int) -> dict[str, float]:
        scale = rate(config.schedule, step, config.steps)
        values = train_step(model, optimizer, batches_of(step), scale, place.world, config.loss, teacher)
        return values | {"lr": scale * config.optimizer.lr}

    model.train()
    loop(model, optimizer, config, place, take, name=name, shown=("loss", "divergence"))
    model.eval()


def finish(model: Qwen3, tokenizer: Tokenizer, place: Place) -> None:
    """Turns the draft into a model artifact: the weights and the tokenizer in place of the last checkpoint."""
    if place.world.rank == 0:
        save_model(model, place.out, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        tokenizer.save(place.out)
    checkpoint.discard(place.out, place.world)
