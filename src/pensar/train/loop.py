"""The training loop: steps, metrics and checkpoints, from wherever a crash left it."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.metrics import Metrics, Recording
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.usage import keeping_freed_memory
from pensar.model.lora import LoraConfig, begin_step
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import save_model
from pensar.text.packing import Batch
from pensar.text.tokenizer import Tokenizer
from pensar.train import checkpoint, lora
from pensar.train.arithmetic import Arithmetic, Precision, compiled
from pensar.train.average import Average, AverageConfig
from pensar.train.balance import ExpertUse
from pensar.train.checkpoint import Part, Saves
from pensar.train.determinism import deterministic
from pensar.train.float8 import float8
from pensar.train.groups import Groups
from pensar.train.guard import BadStep, Guard, GuardConfig
from pensar.train.loss import LossConfig
from pensar.train.observe import Observer
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.profiler import profiled
from pensar.train.recompute import Recompute, recomputed
from pensar.train.schedule import ScheduleConfig, rate
from pensar.train.speed import speed_of
from pensar.train.step import Spread, learning, train_step

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
    and the model is at least 256 wide; in a layout of ranks, on GPUs that have it and nowhere else. `float8` is for the
    blocks' linear layers on GPUs from Ada and Hopper on, in a layout without tensor ranks."""
    compile: bool = False
    """Compile the model's blocks: from a few hundred steps and a width of some 256 on it pays. Not in a layout with
    tensor ranks."""
    deterministic: bool = False
    """Take the deterministic forms of operations, so that the same run on the same kind of device gives the same bits;
    processors do so anyway."""
    losses_every: int = 0
    """Steps between rows of the loss by domain, language, source and kind; 0 for about a hundred rows a stage."""
    observe_every: int = 0
    """Steps between rows of what happens layer by layer: norms of gradients, weights and updates, size of the stream,
    largest attention scores; 0 for none. Such a step takes a tenth longer, more with long contexts, and the weights'
    memory once more; in pipelines stream and scores are left out, scores also where a context is split or blocks
    recompute selectively."""
    lora: LoraConfig | None = None
    """Train small changes of the model that the stage begins with, by AdamW at `optimizer.adamw_lr`, in place of all of
    it. The artifact is the merged model, with the changes in `adapter/`. Not in a layout."""


@dataclass(frozen=True)
class Place:
    """Where one rank of a stage works: the artifact's draft, the log folder, and what shows progress."""

    out: Path
    logs: Path
    world: World
    progress: Progress
    mesh: "Mesh | None" = None
    """The layout that the model is spread in; None where every rank has it whole."""
    recording: Recording = field(default_factory=Recording)

    def metrics(self) -> Metrics | None:
        """Rank 0 writes metrics."""
        return Metrics(self.out, self.logs, self.recording) if self.world.rank == 0 else None


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
    observer: Observer | None = None,
) -> None:
    """Takes `config.steps` steps; a killed run goes on from its last checkpoint with the same result.

    `take(step)` updates the model and returns the step's metrics, `tokens` among them; `shown` names those beside the
    progress bar. `on_start(first)` is called on rank 0 with the step that this attempt begins at, also after a
    rewind. `guard` is what `take` judges its steps and finds its data by; without one a bad step ends the stage.
    `parts` are kept in the checkpoints by their names. What `observer` saw of a step is written down beside it.
    """
    _refuse(config, name, guard, observer)
    average = Average(model, config.average, config.steps, config.checkpoint_every)
    kept: dict[str, Part] = {"average": average, **(parts or {})}
    if guard:
        kept["guard"] = guard
    saves = Saves(place.out, place.world, model, optimizer, kept)
    take = profiled(take, config.steps, place.recording.profile, place.logs, place.world.rank)
    step = saves.restore()
    with (
        place.metrics() or nullcontext() as metrics,
        place.progress.track(name, config.steps) as progress,
        recomputed(model, config.recompute),
        deterministic(config.deterministic),
        saves,
    ):
        if guard and config.guard.on_bad_step == "rewind" and step == 0:
            saves.begin(0)
        if metrics:
            metrics.about(name=name, steps=config.steps, **(observer.about() if observer else {}))
        _begin(step, place, metrics, guard, on_start)
        progress.advance(step)
        while step < config.steps:
            started = time.perf_counter()
            try:
                values = take(step)
            except BadStep as bad:
                if guard is None or config.guard.on_bad_step == "stop":
                    raise
                before, step = step, _leave(guard, step, bad, saves.restore)
                _begin(step, place, metrics, guard, on_start)
                progress.advance(step - before)
                continue
            if metrics:
                _record(metrics, step, values, time.perf_counter() - started, observer)
            step += 1
            progress.advance(1, **{key: values[key] for key in shown if key in values})
            average.update(step)
            saves.look()
            if step % config.checkpoint_every == 0 and step < config.steps:
                saves.begin(step)
    average.apply()


def fit(
    model: Qwen3,
    batches_of: BatchesOf,
    config: LoopConfig,
    place: Place,
    *,
    name: str,
    teacher: Qwen3 | None = None,
    groups: Groups | None = None,
    seed: int = 1,
) -> None:
    """Trains on given batches; the artifact tells what data was skipped and how the experts of a sparse model share,
    and of `groups`, which the batches' tokens belong to, the loss of each. `seed` is that of what LoRA adds."""
    rates = lora.started(model, config, seed=seed, name=name, in_layout=place.mesh is not None)
    optimizer, ranks = _updating(model, rates, place)
    guard, use = Guard(config.guard), ExpertUse(config.steps)
    arithmetic = _arithmetic(model, config, place)
    loss = msgspec.structs.replace(config.loss, compile=config.compile or config.loss.compile)
    observer = Observer(
        place.world,
        place.mesh,
        config.steps,
        losses_every=config.losses_every,
        layers_every=config.observe_every,
        groups=groups,
        scores=config.recompute != "selective",
        speed=speed_of(place.world, place.mesh, arithmetic.precision),
    )

    def take(step: int) -> dict[str, float]:
        scale = rate(config.schedule, step, config.steps)
        batches = batches_of(guard.data_step(step))
        begin_step(model, step)
        with arithmetic():
            values = train_step(
                model,
                optimizer,
                batches,
                scale,
                ranks,
                loss,
                teacher,
                judge=guard.judge,
                use=use if step >= use.first else None,
                witness=observer.at(model, step, batches),
            )
        return values | {"lr": scale * (rates.lr if rates.muon else rates.adamw_lr)}

    shown = ("loss", "divergence")
    parts: dict[str, Part] = {"experts": use, "arithmetic": arithmetic, "observer": observer}
    with (
        float8(model, arithmetic.precision == "float8"),
        compiled(model, config.compile),
        learning(model),
        keeping_freed_memory(),
    ):
        watching: dict[str, Any] = {"guard": guard, "parts": parts, "observer": observer}
        loop(model, optimizer, config, place, take, name=name, shown=shown, **watching)
    if place.world.rank == 0:
        use.write(place.out)


def _arithmetic(model: Qwen3, config: LoopConfig, place: Place) -> Arithmetic:
    if place.mesh is None:
        return Arithmetic(config.precision, model.config.hidden_size, place.world)
    layout = place.mesh.layout
    if config.compile and layout.tp > 1:
        raise ConfigError(
            f"compile=true with tp {layout.tp}, whose exchanges compiled blocks would lose; leave compile at false or "
            "spread the model by shard="
        )
    if config.precision == "float8" and layout.tp > 1:
        raise ConfigError(
            f"precision=float8 with tp {layout.tp}, whose ranks hold parts of each product; leave precision at auto or "
            "spread the model by shard="
        )
    return Arithmetic(config.precision, model.config.hidden_size, place.world, place.mesh.device)


def finish(model: Qwen3, tokenizer: Tokenizer, place: Place) -> None:
    """Turns the draft into a model artifact: the weights and the tokenizer in place of the last checkpoint."""
    whole: Qwen3 | None = model
    if place.mesh is not None:
        from pensar.train.parallel.run import gathered_model

        whole = gathered_model(model, place.mesh)
    if place.world.rank == 0 and whole is not None:
        whole = lora.finished(whole, place.out)
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


def _refuse(config: LoopConfig, name: str, guard: Guard | None, observer: Observer | None) -> None:
    """What only `fit` can do."""
    if guard is None and config.guard != GuardConfig():
        raise ConfigError(
            f"{name}: guard is set, and this stage makes its data by its own model, so that it can only stop at a bad "
            "step; leave guard out"
        )
    if guard is None and config.lora is not None:
        raise ConfigError(
            f"{name}: lora is set, and this stage makes its data by its own model and trains all of it; leave lora out"
        )
    if observer is None and config.observe_every:
        raise ConfigError(
            f"{name}: observe_every is set, and this stage does not look at layers; leave it out here"
        )


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


def _record(
    metrics: Metrics, step: int, values: Mapping[str, float], seconds: float, observer: Observer | None
) -> None:
    metrics.log(step, **values)
    rates = {"tokens_per_second": values["tokens"] / seconds}
    metrics.timing(step, seconds=seconds, **rates, **(observer.timing(seconds) if observer else {}))
    if observer:
        observer.write(metrics, step)


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
