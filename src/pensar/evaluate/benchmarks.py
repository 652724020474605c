"""Benchmarks: held-out problem sets put to a model in thinking and non-thinking mode."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.files import read_jsonl, seed_of
from pensar.base.ranks import World
from pensar.evaluate.statistics import Estimate, mean, pass_at, share
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.rollout import Rollout, RolloutConfig, roll_shared, unmoded
from pensar.infer.score import score
from pensar.model.qwen3 import Qwen3
from pensar.tasks.problems import with_mode
from pensar.tasks.task import Task
from pensar.text.tokenizer import Tokenizer

Mode = Literal["thinking", "non-thinking", "flags", "base"]

MODES: dict[str, tuple[Mode, ...]] = {
    "reasoning": ("thinking", "non-thinking"),
    "instructions": ("thinking", "non-thinking"),
    "tools": ("thinking", "non-thinking"),
    "think_follow": ("flags",),
    "recall": ("base",),
}
"""Benchmark -> the modes it is run in; `flags`: the mode is what the conversation's flags ask; `base`: plain text."""


class Sampling(Config, frozen=True, kw_only=True):
    """Report, section 4.6: temperature 0.6, top-p 0.95, top-k 20 in thinking mode; 0.7, 0.8, 20 without."""

    thinking: RolloutConfig = RolloutConfig(temperature=0.6, top_p=0.95, top_k=20, max_tokens=128)
    direct: RolloutConfig = RolloutConfig(temperature=0.7, top_p=0.8, top_k=20, max_tokens=128)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the stage table."""

    benchmark: str
    mode: Mode
    estimate: Estimate
    families: dict[str, float]
    """Share of right replies by family of problems."""
    tokens: float
    """Mean number of sampled tokens of a reply."""


def problems(
    tasks: Path,
    benchmark: str,
    limit: int | None = None,
    *,
    split: Literal["evaluation", "validation"] = "evaluation",
) -> list[Task]:
    """The benchmark's held-out problems, at least one; ConfigError where there are none."""
    path = tasks / split / f"{benchmark}.jsonl"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.jsonl")))
        raise ConfigError(
            f"there is no benchmark {benchmark!r} in {path.parent}; there are: {known or 'none'}"
        )
    found = list(read_jsonl(path, Task))[:limit]
    if not found:
        raise ConfigError(f"no problem of {path} is left under limit {limit}; raise the limit to at least 1")
    return found


def rolled(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    config: RolloutConfig,
    world: World,
    seed: int,
) -> list[Rollout]:
    """Rollouts of all tasks, in order, shared over the ranks."""
    seeds = [seed_of(seed, "evaluation", i) for i in range(len(tasks))]
    return roll_shared(engine, tokenizer, tasks, config, seeds, world)


def run_benchmark(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    mode: Mode,
    sampling: Sampling,
    world: World,
    seed: int,
) -> tuple[Cell, list[Rollout]]:
    """The score of one benchmark in one mode, and the rollouts behind it."""
    benchmark = tasks[0].family if tasks[0].family in MODES else "reasoning"
    if mode == "base":
        return recall(engine, tokenizer, tasks, world), []
    asked = list(tasks)
    if mode != "flags":
        asked = [with_mode(task, mode == "thinking") for task in tasks]
    config = sampling.direct if mode == "non-thinking" else sampling.thinking
    rollouts = rolled(engine, tokenizer, asked, config, world, seed)
    return _score(benchmark, mode, rollouts), rollouts


def budget_curve(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    budgets: Sequence[int],
    sampling: Sampling,
    world: World,
    seed: int,
) -> list[tuple[int, Estimate]]:
    """Accuracy in thinking mode when the thinking is stopped at each budget (report, figure 2)."""
    curve = []
    asked = [with_mode(task, True) for task in tasks]
    for budget in budgets:
        config = msgspec.structs.replace(sampling.thinking, thinking_budget=budget)
        scores = [unmoded(r).value for r in rolled(engine, tokenizer, asked, config, world, seed)]
        curve.append((budget, share(sum(scores), len(scores))))
    return curve


def pass_curve(
    engine: Engine, tokenizer: Tokenizer, tasks: Sequence[Task], samples: int, world: World, seed: int
) -> tuple[Estimate, Estimate]:
    """Mean pass@1 and pass@`samples` in thinking mode at temperature one."""
    asked = [with_mode(task, True) for task in tasks for _ in range(samples)]
    rollouts = rolled(engine, tokenizer, asked, RolloutConfig(max_tokens=128), world, seed)
    correct = [
        sum(rollout.score.value == 1 for rollout in rollouts[start : start + samples])
        for start in range(0, len(rollouts), samples)
    ]
    first = mean([count / samples for count in correct])
    return first, mean([pass_at(samples, samples, count) for count in correct])


def recall(engine: Engine, tokenizer: Tokenizer, tasks: Sequence[Task], world: World) -> Cell:
    """Share of planted facts that the model writes down when a long text asks for them; greedy, plain text."""
    mine = tasks[world.rank :: world.size]
    requests = []
    for number, task in enumerate(mine):
        params = SamplingParams(max_tokens=len(tokenizer.encode(task.answer)), temperature=0.0)
        requests.append(Request(id=str(number), tokens=tokenizer.encode(task.prompt), params=params))
    replies = [tokenizer.decode(list(completion.tokens)) for completion in engine.run(requests)]
    right = sum(reply == task.answer for reply, task in zip(replies, mine, strict=True))
    lengths = sum(len(request.tokens) for request in requests)
    sums = world.gather((right, lengths))
    estimate = share(sum(r for r, _ in sums), len(tasks))
    length = sum(n for _, n in sums) / len(tasks)
    return Cell(benchmark="recall", mode="base", estimate=estimate, families={}, tokens=length)


def bits_per_byte(model: Qwen3, texts: Sequence[tuple[list[int], int]], world: World) -> list[float]:
    """Bits that the model needs for each byte of every text, given as (tokens, number of bytes), first token free."""
    mine = texts[world.rank :: world.size]
    scores = score(model, [np.asarray(tokens, np.int64) for tokens, _ in mine])
    bits = [-sum(values) / math.log(2) / size for values, (_, size) in zip(scores, mine, strict=True)]
    parts = world.gather(bits)
    return [parts[i % world.size][i // world.size] for i in range(len(texts))]


def _score(benchmark: str, mode: Mode, rollouts: Sequence[Rollout]) -> Cell:
    families: dict[str, list[float]] = {}
    for rollout in rollouts:
        families.setdefault(rollout.task.family, []).append(rollout.score.value)
    return Cell(
        benchmark=benchmark,
        mode=mode,
        estimate=share(sum(rollout.score.value for rollout in rollouts), len(rollouts)),
        families={family: sum(values) / len(values) for family, values in sorted(families.items())},
        tokens=sum(rollout.num_sampled for rollout in rollouts) / max(len(rollouts), 1),
    )
