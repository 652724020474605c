"""The stage that learns learning rate, batch and loss of larger models from many small ones.

The Qwen3 report (section 3.2) sets each stage's hyper-parameters by scaling laws and prints none of them. Here a grid
of runs over sizes, tokens, learning rates and batches is trained, the best learning rate and batch of each size and
number of tokens is read off a quadratic (`optimum.py`), and power laws go through these (`prediction.py`). Where the
best lies at the end of a grid, the grid grows there, by one value a round.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn import functional as F

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.files import write_atomic
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Counts, Runtime
from pensar.data.mixture import HELD_OUT
from pensar.data.order import PretrainData
from pensar.model.count import flops_per_token, parameters
from pensar.model.qwen3 import Qwen3, initialize
from pensar.text.packing import Batch
from pensar.text.tokenizer import Tokenizer
from pensar.train.guard import BadStep
from pensar.train.loop import Place, fit
from pensar.train.loss import inputs_of
from pensar.train.optimizer import OptimizerConfig
from pensar.train.optimum import Point, check_axis, optima
from pensar.train.prediction import FILE, Cell, Prediction, predict_from
from pensar.train.pretrain import PretrainConfig, Shape, row_batches
from pensar.train.schedule import ScheduleConfig

RUNS = "runs"
LEAST_STEPS = 16
"""A run of fewer steps says nothing of its learning rate."""
STEP_FLOPS = 1.5e8
"""What a step of a tiny model takes beside its products, as operations of a core: 5 ms."""
EVALUATED_ROWS = 16
"""Held-out rows that go through a model at once."""


class ScalingConfig(Config, frozen=True, kw_only=True):
    """The grid: every shape with every number of tokens, learning rate and batch."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    learning_rates: tuple[float, ...]
    """Muon's, or AdamW's if `optimizer.muon` is off; AdamW's rate keeps its ratio to Muon's in `optimizer`."""
    batch_tokens: tuple[int, ...]
    """One alone fits the learning rate only; else three or more."""
    mixture: str = "general"
    context: int = 256
    rope_theta: float = 10_000.0
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    """The laws hold for stages with the same schedule."""
    repeats: int = 1
    """Runs of each kind, with seeds of their own."""
    rounds: int = 1
    """How often grids grow by a value where the best lies at their end."""
    held_out_rows: int = 128
    """Rows of held-out documents that losses are measured on."""
    seed: int = 1

    def __post_init__(self) -> None:
        check_axis("learning_rates", self.learning_rates, (3,))
        check_axis("batch_tokens", self.batch_tokens, (1, 3))
        check_axis("tokens", self.tokens, (1,))
        if not self.shapes or self.repeats < 1 or self.rounds < 0 or self.held_out_rows < 1:
            raise ConfigError(
                f"{len(self.shapes)} shapes, repeats {self.repeats}, rounds {self.rounds}, held_out_rows "
                f"{self.held_out_rows}: give at least one shape; only rounds may be 0"
            )
        for batch in self.batch_tokens:
            if not self.allows(batch, min(self.tokens)):
                raise ConfigError(
                    f"batch_tokens {batch} with context {self.context} and {min(self.tokens)} tokens: a batch is whole "
                    f"rows, and a run at least {LEAST_STEPS} steps"
                )

    def allows(self, batch: int, tokens: int) -> bool:
        """Whether runs of so many tokens can have this batch."""
        return batch >= self.context and batch % self.context == 0 and tokens // batch >= LEAST_STEPS


class Trial(msgspec.Struct, frozen=True, order=True):
    """One run of the sweep."""

    shape: int
    tokens: int
    batch_tokens: int
    learning_rate: float
    repeat: int = 0

    @property
    def name(self) -> str:
        kind = f"shape{self.shape}-tokens{self.tokens}-batch{self.batch_tokens}-rate{self.learning_rate:.6g}"
        return f"{kind}-{self.repeat}"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a run."""

    trial: Trial
    parameters: int
    steps: int
    loss: float | None
    """Cross-entropy of held-out text, in nats a token; None where the run diverged."""
    training_loss: float | None
    """Mean over the last tenth of its steps."""


Grids = dict[tuple[int, int], tuple[tuple[float, ...], tuple[int, ...]]]
"""(shape, tokens) -> its learning rates and batches."""


def run(config: ScalingConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `shards` and `tokenizer`; writes runs/*.json, one for each run, and prediction.json."""
    return runtime.crew.call(_on_rank, config, dict(inputs), out, runtime.logs, runtime.progress)


def _on_rank(
    world: World, config: ScalingConfig, inputs: dict[str, Path], out: Path, logs: Path, progress: Progress
) -> Counts:
    sweep = _Sweep(config, inputs, out, logs)
    grids: Grids = {
        (shape, tokens): (config.learning_rates, config.batch_tokens)
        for shape in range(len(config.shapes))
        for tokens in config.tokens
    }
    results: dict[Trial, Result] = {}
    for number in range(config.rounds + 1):
        todo = sorted(set(trials(grids, config.repeats)) - results.keys(), key=sweep.cost, reverse=True)
        mine = todo[world.rank :: world.size]
        found = []
        with progress.track(f"scaling, round {number + 1}", len(mine), "run") as track:
            for trial in mine:
                found.append(sweep.result(trial))
                track.advance(1, loss=found[-1].loss or math.inf)
        results |= {result.trial: result for part in world.gather(found) for result in part}
        grown = grow(config, grids, cells_of(config, grids, results.values()))
        if grown == grids:
            break
        if number < config.rounds:
            grids = grown
    prediction = predict_from(cells_of(config, grids, results.values()), config.context, config.optimizer)
    if world.rank == 0:
        content = msgspec.json.format(msgspec.json.encode(prediction), indent=1)
        write_atomic(out / FILE, content + b"\n")
    world.barrier()
    return _counts(results.values(), prediction)


def trials(grids: Grids, repeats: int) -> list[Trial]:
    """Every run of the grids, in order."""
    return sorted(
        Trial(shape, tokens, batch, rate, repeat)
        for (shape, tokens), (rates, batches) in grids.items()
        for batch in batches
        for rate in rates
        for repeat in range(repeats)
    )


def cells_of(config: ScalingConfig, grids: Grids, results: Any) -> list[Cell]:
    """The results by size and tokens, each cell with its optimum."""
    ordered = sorted(results, key=lambda result: result.trial)
    own = [[r for r in ordered if (r.trial.shape, r.trial.tokens) == key] for key in grids]
    points = [[Point(r.trial.learning_rate, r.trial.batch_tokens, r.loss) for r in rows] for rows in own]
    return [
        Cell(
            parameters=rows[0].parameters,
            tokens=tokens,
            hidden_size=config.shapes[shape].model(1).hidden_size,
            points=chosen,
            optimum=None if isinstance(best, str) else best,
            why=best if isinstance(best, str) else "",
        )
        for (shape, tokens), rows, chosen, best in zip(grids, own, points, optima(points), strict=True)
    ]


def grow(config: ScalingConfig, grids: Grids, cells: Sequence[Cell]) -> Grids:
    """The grids with one more value wherever the best of a cell lies at the end of one."""
    grown: Grids = {}
    for (key, (rates, batches)), cell in zip(grids.items(), cells, strict=True):
        best = cell.optimum
        if best is not None and best.rate_edge:
            rates = _longer(rates, best.rate_edge, best.rate.value)
        if best is not None and best.batch_edge:
            longer = tuple(round(value) for value in _longer(batches, best.batch_edge, best.batch.value))
            batches = tuple(batch for batch in longer if config.allows(batch, cell.tokens))
        grown[key] = rates, batches
    return grown


def _longer(values: Sequence[float], edge: str, at: float) -> tuple[float, ...]:
    """With one more value by the ratio of the last two; as they are if `at` is not the end of all of them."""
    if edge == "low":
        end, beside = values[0], values[1]
    else:
        end, beside = values[-1], values[-2]
    if not math.isclose(end, at, rel_tol=1e-6):
        return tuple(values)
    # Six digits, so that the run's name says its rate.
    return tuple(sorted([*values, float(f"{end * end / beside:.6g}")]))


class _Sweep:
    """What the runs of one rank have in common."""

    def __init__(self, config: ScalingConfig, inputs: Mapping[str, Path], out: Path, logs: Path) -> None:
        self.config, self._shards, self._out, self._logs = config, inputs["shards"], out, logs
        vocabulary = Tokenizer.load(inputs["tokenizer"]).vocab_size
        changes: dict[str, Any] = {"rope_theta": config.rope_theta, "max_positions": config.context}
        self._models = [shape.model(vocabulary, **changes) for shape in config.shapes]
        self._held_out = held_out_batches(self._shards, config.context, config.held_out_rows)

    def cost(self, trial: Trial) -> tuple[float, Trial]:
        """Operations, and the run itself to settle ties."""
        flops = trial.tokens * flops_per_token(self._models[trial.shape], self.config.context)
        return flops + trial.tokens // trial.batch_tokens * STEP_FLOPS, trial

    def result(self, trial: Trial) -> Result:
        """What became of a run, which is trained where its file is not there yet."""
        path = self._out / RUNS / f"{trial.name}.json"
        if not path.exists():
            result = self._train(trial)
            write_atomic(path, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        return msgspec.json.decode(path.read_bytes(), type=Result)

    def _train(self, trial: Trial) -> Result:
        shape, config = self._models[trial.shape], train_config(self.config, trial)
        loop = config.loop()
        work = self._out / f".{trial.name}"
        # A killed run begins again: only whole ones count.
        shutil.rmtree(work, ignore_errors=True)
        model = Qwen3(shape)
        initialize(
            model, config.seed, previous_token_heads=self.config.shapes[trial.shape].previous_token_heads
        )
        data = PretrainData(self._shards, mixture=config.mixture, context=config.context, seed=config.seed)
        loss: float | None = None
        try:
            place = Place(work, self._logs / trial.name, World(), Progress())
            fit(model, row_batches(data, config), loop, place, name=trial.name)
            loss = held_out_loss(model, self._held_out)
        except BadStep:
            loss = None
        rows = [msgspec.json.decode(line) for line in (work / "metrics.jsonl").read_bytes().splitlines()]
        shutil.rmtree(work)
        last = [row["loss"] for row in rows[-max(1, loop.steps // 10) :]]
        return Result(
            trial=trial,
            parameters=parameters(shape).active_non_embedding,
            steps=loop.steps,
            loss=loss if loss is not None and math.isfinite(loss) else None,
            training_loss=sum(last) / len(last) if loss is not None else None,
        )


def train_config(config: ScalingConfig, trial: Trial) -> PretrainConfig:
    """The pre-training stage that one run is."""
    rate, optimizer = trial.learning_rate, config.optimizer
    adamw_rate = rate * optimizer.adamw_lr / optimizer.lr if optimizer.muon else rate
    rates = {"lr": rate if optimizer.muon else optimizer.lr, "adamw_lr": adamw_rate}
    return PretrainConfig(
        tokens=trial.tokens,
        mixture=config.mixture,
        context=config.context,
        batch_tokens=trial.batch_tokens,
        rope_theta=config.rope_theta,
        seed=config.seed + trial.repeat,
        shape=config.shapes[trial.shape],
        optimizer=msgspec.structs.replace(optimizer, **rates),
        schedule=config.schedule,
        checkpoint_every=trial.tokens,
    )


def held_out_batches(shards: Path, context: int, rows: int) -> list[Batch]:
    """The first rows of one pass over the held-out documents, fewer where there are not so many."""
    data = PretrainData(shards, mixture=HELD_OUT, context=context, seed=0)
    rows = min(rows, data.num_tokens // context)
    num = min(rows, EVALUATED_ROWS)
    config = PretrainConfig(tokens=1, mixture=HELD_OUT, context=context, batch_tokens=num * context)
    batches_of = row_batches(data, config)
    return [batch for step in range(rows // num) for batch in batches_of(step)]


@torch.inference_mode()
def held_out_loss(model: Qwen3, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy, in nats, of the tokens that are predicted: all but the first of each document."""
    total = weight = 0.0
    model.eval()
    for batch in batches:
        logits_BTV = model.logits(inputs_of(batch).hidden(model)[:, :-1])
        targets_BT = torch.from_numpy(batch.tokens[:, 1:]).long()
        assert batch.ce is not None
        weights = torch.from_numpy(batch.ce[:, 1:]).flatten()
        losses = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
        total += float((losses * weights).sum())
        weight += float(weights.sum())
    return total / weight


def _counts(results: Any, prediction: Prediction) -> Counts:
    """What the manifest shows."""
    known = {
        "rate": (prediction.rate, prediction.rate_why),
        "batch": (prediction.batch, prediction.batch_why),
    }
    counts: Counts = {
        "runs": len(results),
        "diverged": sum(result.loss is None for result in results),
        "tokens": sum(result.trial.tokens for result in results),
        "cells": len(prediction.cells),
        "bounds": len(prediction.notes),
    }
    for name, (law, why) in known.items():
        exponents = {} if law is None else {key: round(law.exponent(key).value, 4) for key in law.variables}
        counts[f"{name}_law"] = (
            why if law is None else {"factor": float(f"{law.factor.value:.4g}")} | exponents
        )
    loss = prediction.loss
    names = ("floor", "size_factor", "size_exponent", "tokens_factor", "tokens_exponent")
    counts["loss_law"] = (
        prediction.loss_why
        if loss is None
        else dict(zip(names, (float(f"{value:.4g}") for value in loss.coefficients), strict=True))
    )
    return counts
