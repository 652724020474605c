"""The stage that learns thinking budgets: the model answers questions, and how long it thought is told from each one.

The model stays as it is, and its folder is written anew with what was learned beside it (infer/adaptive.py). Questions
that nothing was learned from say what it is worth: accuracy against tokens of thinking, with one budget for all of them
and with learned ones, at equal shares of questions that the budgets are to suffice for.
Shape legend: n questions, D hidden.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.files import seed_of, whole_lines, write_atomic
from pensar.base.metrics import Recording
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Counts, Runtime
from pensar.infer.adaptive import AdaptiveBudget
from pensar.infer.engine import Engine
from pensar.infer.rollout import Rollout, RolloutConfig, prompt_mode, roll_shared, unmoded
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model
from pensar.posttrain.examples import num_learned, path_of, queries_of
from pensar.tasks.problems import with_mode
from pensar.tasks.task import Task
from pensar.text.chat import encode_prompt
from pensar.text.packing import one_per_row
from pensar.text.sample import Sample
from pensar.text.tokenizer import Tokenizer
from pensar.train.loop import Place, finish
from pensar.train.loss import inputs_of

ANSWERS, CURVE = "answers.jsonl", "budget_curve.jsonl"
BLOCK = 128
"""Questions that are answered before anything is written down; an attempt that is killed loses so many at most."""
ROWS = 32
"""Prompts that go through the model at once."""

Way = Literal["unlimited", "fixed", "learned"]
"""No budget, the same for all questions, or one of each question's own."""
Row = TypeVar("Row", "Answered", "Point")


class ThinkingBudgetConfig(Config, frozen=True, kw_only=True):
    """Budgets told from questions."""

    seed: int = 1
    queries: str = "reinforcement"
    num_queries: int = 600
    samples: int = 4
    """Replies to each, of which the right ones are learned from."""
    held_out: int = 200
    """Further queries, which the curve is measured on."""
    shares: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    """Of questions that the curve's budgets are to suffice for."""
    rollout: RolloutConfig = RolloutConfig(temperature=0.6, top_p=0.95, top_k=20, max_tokens=128)

    def __post_init__(self) -> None:
        if min(self.num_queries, self.samples, self.held_out) < 1 or not all(0 < s < 1 for s in self.shares):
            raise ConfigError(
                f"num_queries {self.num_queries}, samples {self.samples}, held_out {self.held_out} must be at least 1, "
                f"shares {list(self.shares)} between 0 and 1"
            )
        if self.rollout.thinking_budget is not None or self.rollout.adaptive_budget:
            raise ConfigError(
                "rollout has a thinking budget, and how long the model thinks without one is what is learned; leave "
                "thinking_budget and adaptive_budget out"
            )


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a question."""

    task: str
    reasoning: list[int]
    """Reasoning tokens of each right reply."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The held-out questions, answered under one way of giving budgets."""

    way: Way
    share: float
    """Of questions that the budgets were to suffice for."""
    budget: float | None
    """Mean over the questions; None without limit."""
    right: int
    questions: int
    reasoning_tokens: float
    """Mean over the questions."""
    sufficed: float
    """Share of questions whose thinking ended by itself."""


def run(config: ThinkingBudgetConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `model` and `tasks`; writes the model, thinking_budget.safetensors, answers.jsonl, budget_curve.jsonl."""
    place = runtime.logs, runtime.progress, runtime.recording
    return runtime.crew.call(_on_rank, config, dict(inputs), out, *place)


def _on_rank(
    world: World,
    config: ThinkingBudgetConfig,
    inputs: dict[str, Path],
    out: Path,
    logs: Path,
    progress: Progress,
    recording: Recording,
) -> Counts:
    place = Place(out, logs, world, progress, recording=recording)
    model, tokenizer = load_model(inputs["model"]), Tokenizer.load(inputs["model"])
    queries = queries_of(inputs["tasks"], config.queries)
    asked = [with_mode(task, True) for task in queries if task.thinking is not False]
    tasks = asked[: config.num_queries + config.held_out]
    num = num_learned(
        tasks, config.held_out, path_of(inputs["tasks"], config.queries), "queries to think about"
    )
    engine = Engine(model, tokenizer, slots=128)
    answered = answers(engine, tokenizer, tasks[:num], config, place)
    states_nD = prompt_states(model, tokenizer, tasks, world)
    solved = [i for i, answer in enumerate(answered) if answer.reasoning]
    lengths = [answered[i].reasoning for i in solved]
    engine.adaptive = AdaptiveBudget.fit(states_nD[solved], lengths)
    curve(engine, tokenizer, tasks[num:], states_nD[num:], [first for first, *_ in lengths], config, place)
    if world.rank == 0:
        engine.adaptive.save(out)
    finish(model, tokenizer, place)
    return {"queries": num, "learned_from": len(solved), "held_out": config.held_out}


def answers(
    engine: Engine, tokenizer: Tokenizer, tasks: Sequence[Task], config: ThinkingBudgetConfig, place: Place
) -> list[Answered]:
    """Every question answered `samples` times, on every rank; goes on from what an attempt has written down."""
    done = _begin(place, ANSWERS, Answered, whole=BLOCK)
    with place.progress.track("answers", len(tasks), unit="question") as track:
        track.advance(len(done))
        for start in range(len(done), len(tasks), BLOCK):
            part = tasks[start : start + BLOCK]
            asked = [task for task in part for _ in range(config.samples)]
            seeds = [
                seed_of(config.seed, "thinking budget", start + i, n)
                for i in range(len(part))
                for n in range(config.samples)
            ]
            rolled = roll_shared(
                engine, tokenizer, asked, config.rollout, seeds, place.world, together=config.samples
            )
            rows = [
                Answered(
                    task=task.id,
                    reasoning=[
                        rollout.reasoning[0]
                        for rollout in rolled[at * config.samples : (at + 1) * config.samples]
                        if rollout.score.value == 1
                    ],
                )
                for at, task in enumerate(part)
            ]
            _append(place, ANSWERS, rows)
            done += rows
            track.advance(len(rows))
    return done


@torch.no_grad()
def prompt_states(model: Qwen3, tokenizer: Tokenizer, tasks: Sequence[Task], world: World) -> Tensor:
    """[n, D] of each question the state that its reply's first token is drawn from."""
    states: list[Tensor] = []
    mine = tasks[world.rank :: world.size]
    for start in range(0, len(mine), ROWS):
        prompts = [
            np.asarray(encode_prompt(tokenizer, task.conversation(), thinking=prompt_mode(task)), np.int32)
            for task in mine[start : start + ROWS]
        ]
        hidden_BTD = inputs_of(one_per_row([Sample(tokens=prompt) for prompt in prompts])).hidden(model)
        states += [hidden_BTD[row, len(prompt) - 1].clone() for row, prompt in enumerate(prompts)]
    return torch.stack(world.dealt(states))


def curve(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    states_nD: Tensor,
    lengths: Sequence[int],
    config: ThinkingBudgetConfig,
    place: Place,
) -> list[Point]:
    """The questions under every way of giving budgets; `lengths` are of the questions that were learned from.

    Equal seeds for every way: replies are the same until a budget is spent.
    """
    assert engine.adaptive is not None
    ways: list[tuple[Way, float]] = [("unlimited", 1.0)]
    ways += [(way, share) for share in config.shares for way in ("fixed", "learned")]
    seeds = [seed_of(config.seed, "thinking budget", "held out", i) for i in range(len(tasks))]
    done = _begin(place, CURVE, Point)
    with place.progress.track("budget curve", len(ways), unit="point") as track:
        track.advance(len(done))
        for way, share in ways[len(done) :]:
            budget: float | None = None
            rollout = config.rollout
            if way == "fixed":
                budget = enough(lengths, share)
                rollout = msgspec.structs.replace(rollout, thinking_budget=budget)
            elif way == "learned":
                budget = float(np.mean([engine.adaptive.budget(state, share) for state in states_nD]))
                rollout = msgspec.structs.replace(rollout, adaptive_budget=share)
            rolled = roll_shared(engine, tokenizer, tasks, rollout, seeds, place.world)
            point = _point(way, share, budget, rolled)
            _append(place, CURVE, [point])
            done.append(point)
            track.advance(1)
    return done


def enough(lengths: Sequence[int], share: float) -> int:
    """One budget for all questions: it suffices for this share of new ones, as far as those that were seen can tell."""
    rank = min(len(lengths), math.ceil(share * (len(lengths) + 1)))
    return sorted(lengths)[max(1, rank) - 1]


def _point(way: Way, share: float, budget: float | None, rollouts: Sequence[Rollout]) -> Point:
    return Point(
        way=way,
        share=share,
        budget=None if budget is None else round(budget, 4),
        right=sum(unmoded(rollout).value == 1 for rollout in rollouts),
        questions=len(rollouts),
        reasoning_tokens=round(float(np.mean([sum(rollout.reasoning) for rollout in rollouts])), 4),
        sufficed=round(float(np.mean([not rollout.stopped for rollout in rollouts])), 4),
    )


# ---------------------------------------------------------------- what outlives an attempt


def _begin(place: Place, name: str, kind: type[Row], whole: int = 1) -> list[Row]:
    """The rows of a file that an attempt left, the same on every rank, in parts of `whole`; what is torn is dropped."""
    rows: list[Row] = []
    path = place.out / name
    if place.world.rank == 0 and path.exists():
        lines = whole_lines(path)
        lines = lines[: len(lines) // whole * whole]
        write_atomic(path, b"".join(lines))
        rows = [msgspec.json.decode(line, type=kind) for line in lines]
    return place.world.broadcast(rows)


def _append(place: Place, name: str, rows: Sequence[Row]) -> None:
    if place.world.rank == 0:
        with (place.out / name).open("ab") as file:
            file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
