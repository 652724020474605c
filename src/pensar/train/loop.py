"""The training loop: steps, metrics and checkpoints, from wherever a crash left it."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.metrics import Metrics
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import save_model
from pensar.text.packing import Batch
from pensar.text.tokenizer import Tokenizer
from pensar.train import checkpoint, sharded
from pensar.train.arithmetic import Arithmetic, Precision, compiled
from pensar.train.average import Average, AverageConfig
from pensar.train.balance import ExpertUse
from pensar.train.guard import BadStep, Guard, GuardConfig
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.recompute import Recompute, recomputed
from pensar.train.schedule import ScheduleConfig, rate
from pensar.train.step import Spread, train_step

if TYPE_CHECKING:
    from pensar.train.parallel.mesh import Mesh
    from pensar.train.parallel.optimizer import ShardedOptimizer

BatchesOf = Callable[[int], list[Batch]]
"""Data step -> its micro-batches: a pure function, so that any step can be run again."""


class LoopConfig(Config, frozen=True, kw_only=True):
    """What every stage that trains has in common."""

    steps: int
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    checkpoint_every: int = 50
    guard: GuardConfig = GuardConfig()
    average: AverageConfig = AverageConfig()
    recompute: Recompute = "none"
    """What the backward pass computes again to save memory: blocks whole (`full`), or all of them but products and
    attention (`selective`)."""
    precision: Precision = "auto"
    """Type of the products: `auto` takes bfloat16 if this processor multiplies it at least twice as fast as float32
    and the model is at least 256 wide. In a layout of ranks always float32."""
    compile: bool = False
    """Compile the model's blocks: from a few hundred steps and a width of some 256 on it pays. Not in a layout."""


@dataclass(frozen=True)
class Place:
    """Where one rank of a stage works: the artifact's draft, the log folder, and what shows progress."""

    out: Path
    logs: Path
    world: World
    progress: Progress
    mesh: "Mesh | None" = None
    """The layout that the model is spread in; None where every rank has it whole."""

    def metrics(self) -> Metrics | None:
        """Rank 0 writes metrics."""
        return Metrics(self.out, self.logs) if self.world.rank == 0 else None


class Part(Protocol):
    """Whatever beside model and optimiser must be as it was when a run goes on from a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def loop(
    model: Qwen3,
    optimizer: "Optimizer | ShardedOptimizer",
    config: LoopConfig,
    place: Place,
    take: Callable[[int], dict[str, float]],
    *,
    name: str,
    shown: Sequence[str],
    on_start: Callable[[int], None] | None = None,
    guard: Guard | None = None,
    parts: Mapping[str, Part] | None = None,
) -> None:
    """Takes `config.steps` steps; a killed run goes on from its last checkpoint with the same result.

    `take(step)` updates the model and returns the step's metrics, `tokens` among them; `shown` names those beside the
    progress bar. `on_start(first)` is called on rank 0 with the step that this attempt begins at, also after a
    rewind. `guard` is what `take` judges its steps and finds its data by; without one a bad step ends the stage.
    `parts` are kept in the checkpoints by their names.
    """
    if guard is None and config.guard != GuardConfig():
        raise ConfigError(
            f"{name}: guard is set, and this stage makes its data by its own model, so that it can only stop at a bad "
            "step; leave guard out"
        )
    average = Average(model, config.average, config.steps, config.checkpoint_every)
    kept: dict[str, Part] = {"average": average, **(parts or {})}
    if guard:
        kept["guard"] = guard
    save = partial(_save, model, optimizer, place, kept)
    restore = partial(_restore, model, optimizer, place, kept)
    step = restore()
    if guard and config.guard.on_bad_step == "rewind" and step == 0:
        save(0)
    with (
        place.metrics() or nullcontext() as metrics,
        place.progress.track(name, config.steps) as progress,
        recomputed(model, config.recompute),
    ):
        _begin(step, place, metrics, guard, on_start)
        progress.advance(step)
        while step < config.steps:
            started = time.perf_counter()
            try:
                values = take(step)
            except BadStep as bad:
                if guard is None or config.guard.on_bad_step == "stop":
                    raise
                before, step = step, _leave(guard, step, bad, restore)
                _begin(step, place, metrics, guard, on_start)
                progress.advance(step - before)
                continue
            if metrics:
                metrics.log(step, **values)
                seconds = time.perf_counter() - started
                metrics.timing(step, seconds=seconds, tokens_per_second=values["tokens"] / seconds)
            step += 1
            progress.advance(1, **{key: values[key] for key in shown if key in values})
            average.update(step)
            if step % config.checkpoint_every == 0 and step < config.steps:
                save(step)
    average.apply()


def fit(
    model: Qwen3,
    batches_of: BatchesOf,
    config: LoopConfig,
    place: Place,
    *,
    name: str,
    teacher: Qwen3 | None = None,
) -> None:
    """Trains on given batches; the artifact tells what data was skipped and how the experts of a sparse model share."""
    optimizer, ranks = _updating(model, config.optimizer, place)
    guard, use = Guard(config.guard), ExpertUse(config.steps)
    arithmetic = _arithmetic(model, config, place)

    def take(step: int) -> dict[str, float]:
        scale = rate(config.schedule, step, config.steps)
        with arithmetic():
            values = train_step(
                model,
                optimizer,
                batches_of(guard.data_step(step)),
                scale,
                ranks,
                config.loss,
                teacher,
                judge=guard.judge,
                use=use if step >= use.first else None,
            )
        return values | {"lr": scale * config.optimizer.lr}

    model.train()
    shown = ("loss", "divergence")
    parts: dict[str, Part] = {"experts": use, "arithmetic": arithmetic}
    with compiled(model, config.compile):
        loop(model, optimizer, config, place, take, name=name, shown=shown, guard=guard, parts=parts)
    model.eval()
    if place.world.rank == 0:
        use.write(place.out)


def _arithmetic(model: Qwen3, config: LoopConfig, place: Place) -> Arithmetic:
    if place.mesh is None:
        return Arithmetic(config.precision, model.config.hidden_size, place.world)
    if config.precision == "bfloat16" or config.compile:
        raise ConfigError(
            f"precision={config.precision}, compile={str(config.compile).lower()} in a layout of ranks, which computes "
            "in float32 and as written; leave them at auto and false, or train without a layout"
        )
    return Arithmetic("float32", model.config.hidden_size, place.world)


def finish(model: Qwen3, tokenizer: Tokenizer, place: Place) -> None:
    """Turns the draft into a model artifact: the weights and the tokenizer in place of the last checkpoint."""
    whole: Qwen3 | None = model
    if place.mesh is not None:
        from pensar.train.parallel.run import gathered_model

        whole = gathered_model(model, place.mesh)
    if place.world.rank == 0 and whole is not None:
        save_model(whole, place.out, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        tokenizer.save(place.out)
    checkpoint.discard(place.out, place.world)


def _updating(
    model: Qwen3, config: OptimizerConfig, place: Place
) -> "tuple[Optimizer | ShardedOptimizer, World | Spread]":
    """The optimiser of a whole or of a spread model, and how its steps are spread."""
    if place.mesh is None:
        return Optimizer(model, config), place.world
    from pensar.train.parallel.optimizer import ShardedOptimizer
    from pensar.train.parallel.step import Meshed

    return ShardedOptimizer(model, config, place.mesh), Meshed(place.mesh)


def _save(
    model: Qwen3,
    optimizer: "Optimizer | ShardedOptimizer",
    place: Place,
    kept: Mapping[str, Part],
    step: int,
) -> None:
    extra = {name: part.state_dict() for name, part in kept.items()}
    if isinstance(optimizer, Optimizer):
        checkpoint.save(place.out, model, optimizer, step, place.world, **extra)
    else:
        sharded.save(place.out, model, optimizer, step, place.world, extra)


def _restore(
    model: Qwen3, optimizer: "Optimizer | ShardedOptimizer", place: Place, kept: Mapping[str, Part]
) -> int:
    """Everything as the last checkpoint holds it; returns the number of finished steps."""
    if isinstance(optimizer, Optimizer):
        step, extra = checkpoint.resume(place.out, model, optimizer)
    else:
        step, extra = sharded.resume(place.out, model, optimizer, place.world)
    for name, part in kept.items():
        if name in extra:
            part.load_state_dict(extra[name])
    return step


def _begin(
    step: int,
    place: Place,
    metrics: Metrics | None,
    guard: Guard | None,
    on_start: Callable[[int], None] | None,
) -> None:
    """Rank 0 drops from the artifact what was written after `step`."""
    if metrics:
        metrics.rewind(step - 1)
    if place.world.rank == 0 and guard:
        guard.write(place.out)
    if place.world.rank == 0 and on_start:
        on_start(step)


def _leave(guard: Guard, step: int, bad: BadStep, restore: Callable[[], int]) -> int:
    """Leaves the data of a bad step behind; returns the step to go on with.

    What was skipped since the checkpoint is not known to it, and stays skipped.
    """
    if guard.config.on_bad_step == "skip":
        guard.skip(step, step, bad)
        return step
    skipped = guard.skipped
    back_to = restore()
    guard.skipped = skipped
    guard.skip(back_to, step, bad)
    return back_to
