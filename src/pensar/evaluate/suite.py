"""The suite: every benchmark after every stage, the budget curve, reinforcement learning against distillation.

One stage of the pipeline; `evaluate_model` runs the same benchmarks on any model directory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.files import seed_of, write_atomic
from pensar.base.progress import Progress
from pensar.base.ranks import Crew, World
from pensar.base.stage import Counts, Runtime
from pensar.evaluate import benchmarks
from pensar.evaluate.benchmarks import MODES, Cell, Mode, Sampling
from pensar.evaluate.costs import cost
from pensar.evaluate.heldout import held_out_texts
from pensar.evaluate.statistics import Estimate, mean, share
from pensar.infer.engine import Engine
from pensar.infer.rollout import Rollout
from pensar.model.config import replace
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model
from pensar.tasks.problems import with_mode
from pensar.text.tokenizer import Tokenizer


class EvaluateConfig(Config, frozen=True, kw_only=True):
    """How much is measured."""

    seed: int = 1
    limit: int = 300
    """Problems of each benchmark."""
    sampling: Sampling = Sampling()
    budgets: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 32, 40, 48)
    """Reasoning tokens at which the thinking is stopped."""
    pass_problems: int = 50
    pass_samples: int = 64
    long_length: int = 1_024
    """Tokens of the held-out windows for bits per byte at the long context."""
    long_texts: int = 48
    conversations: int = 3
    """Sample conversations kept for each benchmark and mode."""


@dataclass(frozen=True)
class _Bench:
    """What every measurement of a stage's run needs."""

    config: EvaluateConfig
    inputs: Mapping[str, Path]
    world: World

    def open(self, role: str) -> tuple[Engine, Tokenizer]:
        tokenizer = Tokenizer.load(self.inputs[role])
        return Engine(load_model(self.inputs[role]), tokenizer, slots=256), tokenizer


CHAT_STAGES = ("cold_start", "reasoning_rl", "fusion", "general_rl")
"""Roles of the models whose benchmarks make the stage table, in order."""
BASE_STAGES = ("reasoning", "long")
"""Roles of the base models before and after the long-context stage."""
STUDENTS = {"off-policy distillation": "student", "+ reinforcement learning": "student_rl",
            "+ on-policy distillation": "student_distilled"}  # fmt: skip
RESULTS = "results.json"


def run(config: EvaluateConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `tasks`, `shards` and the models by role; writes results.json."""
    return runtime.crew.call(_on_rank, config, dict(inputs), out, runtime.progress)


def _on_rank(
    world: World, config: EvaluateConfig, inputs: dict[str, Path], out: Path, progress: Progress
) -> Counts:
    bench = _Bench(config, inputs, world)
    results: dict[str, Any] = {"stage_table": [], "conversations": [], "validation": []}
    with progress.track("evaluation", len(CHAT_STAGES) + 3) as shown:
        for role in CHAT_STAGES:
            cells, conversations = stage_cells(bench, role)
            results["stage_table"] += [_row(role, cell) for cell in cells]
            if role == CHAT_STAGES[-1]:
                results["conversations"] = conversations
            if role in ("cold_start", "reasoning_rl"):
                results["validation"].append(_validation(bench, role))
            shown.advance(1)
        results |= _budgets(bench, results["stage_table"])
        shown.advance(1)
        results["rl_against_distillation"] = _students(bench)
        shown.advance(1)
        results["long_context"] = _long_context(bench)
        shown.advance(1)
    follow = [row for row in results["stage_table"] if row["benchmark"] == "think_follow"]
    results["think_follow"] = {key: follow[-1][key] for key in ("score", "low", "high", "n")}
    if world.rank == 0:
        write_atomic(out / RESULTS, msgspec.json.format(msgspec.json.encode(results), indent=1))
    return {"cells": len(results["stage_table"])}


def stage_cells(bench: _Bench, role: str) -> tuple[list[Cell], list[dict[str, Any]]]:
    """All cells of one model, and sample conversations."""
    engine, tokenizer = bench.open(role)
    cells, conversations = [], []
    for benchmark, modes in MODES.items():
        if modes == ("base",):
            continue
        tasks = benchmarks.problems(bench.inputs["tasks"], benchmark, bench.config.limit)
        for mode in modes:
            seed = seed_of(bench.config.seed, benchmark, mode)
            cell, rollouts = benchmarks.run_benchmark(
                engine, tokenizer, tasks, mode, bench.config.sampling, bench.world, seed
            )
            cells.append(msgspec.structs.replace(cell, benchmark=benchmark))
            chosen = rollouts[: bench.config.conversations]
            conversations += [_conversation(benchmark, mode, rollout) for rollout in chosen]
    return cells, conversations


def evaluate_model(
    model: Path,
    tasks: Path,
    *,
    names: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 1,
    sampling: Sampling | None = None,
    crew: Crew | None = None,
) -> list[dict[str, Any]]:
    """Rows (benchmark, mode, score, low, high, n) of any model directory on the problem sets in `tasks`.

    Raises ConfigError for a benchmark that does not exist.
    """
    unknown = sorted(set(names) - set(MODES))
    if unknown:
        raise ConfigError(f"unknown benchmark {unknown[0]!r}; there are: {', '.join(MODES)}")
    arguments = (model, tasks, tuple(names or MODES), limit, seed, sampling or Sampling())
    return (crew or Crew()).call(_model_rows, *arguments)


def _model_rows(
    world: World,
    model: Path,
    tasks: Path,
    names: tuple[str, ...],
    limit: int | None,
    seed: int,
    sampling: Sampling,
) -> list[dict[str, Any]]:
    tokenizer = Tokenizer.load(model)
    engine = Engine(load_model(model), tokenizer, slots=256)
    rows = []
    for benchmark in names:
        asked = benchmarks.problems(tasks, benchmark, limit)
        for mode in MODES[benchmark]:
            seeded = seed_of(seed, benchmark, mode)
            cell, _ = benchmarks.run_benchmark(engine, tokenizer, asked, mode, sampling, world, seeded)
            rows.append(_row("", msgspec.structs.replace(cell, benchmark=benchmark)))
    return rows


def _row(role: str, cell: Cell) -> dict[str, Any]:
    return {
        "benchmark": cell.benchmark,
        "after_stage": role.replace("_", "-"),
        "mode": cell.mode,
        **_numbers(cell.estimate),
        "families": cell.families,
        "tokens": cell.tokens,
    }


def _numbers(estimate: Estimate, prefix: str = "") -> dict[str, float]:
    values = msgspec.structs.asdict(estimate)
    if not prefix:
        return values
    return {prefix: values["score"], f"{prefix}_low": values["low"], f"{prefix}_high": values["high"]}


def _conversation(benchmark: str, mode: Mode, rollout: Rollout) -> dict[str, Any]:
    messages = [*rollout.task.conversation().messages, *rollout.turns]
    return {
        "title": f"{benchmark}: {rollout.task.family}",
        "mode": mode,
        "score": rollout.score.value,
        "messages": msgspec.to_builtins(messages),
    }


def _validation(bench: _Bench, role: str) -> dict[str, Any]:
    """Accuracy on the problems reserved for validation, in thinking mode."""
    engine, tokenizer = bench.open(role)
    tasks = [
        with_mode(task, True)
        for task in benchmarks.problems(bench.inputs["tasks"], "reasoning", split="validation")
    ]
    seed = seed_of(bench.config.seed, "validation")
    rollouts = benchmarks.rolled(engine, tokenizer, tasks, bench.config.sampling.thinking, bench.world, seed)
    estimate = share(sum(rollout.score.value for rollout in rollouts), len(rollouts))
    few = benchmarks.problems(
        bench.inputs["tasks"], "reasoning", bench.config.pass_problems, split="validation"
    )
    one, many = benchmarks.pass_curve(engine, tokenizer, few, bench.config.pass_samples, bench.world, seed)
    return {
        "stage": role.replace("_", "-"),
        **_numbers(estimate),
        **_numbers(one, "pass_at_1"),
        **_numbers(many, "pass_at_k"),
        "k": bench.config.pass_samples,
    }


def _budgets(bench: _Bench, table: list[dict[str, Any]]) -> dict[str, Any]:
    """The budget curve of the final model, and the scores that it runs between."""
    role = CHAT_STAGES[-1]
    engine, tokenizer = bench.open(role)
    tasks = benchmarks.problems(bench.inputs["tasks"], "reasoning", bench.config.limit)
    seed = seed_of(bench.config.seed, "budget")
    curve = benchmarks.budget_curve(
        engine, tokenizer, tasks, bench.config.budgets, bench.config.sampling, bench.world, seed
    )
    rows = []
    for budget, estimate in curve:
        values = _numbers(estimate)
        rows.append({"budget": budget, "accuracy": values.pop("score"), **values})
    last = {
        row["mode"]: row["score"]
        for row in table
        if row["benchmark"] == "reasoning" and row["after_stage"] == role.replace("_", "-")
    }
    references = {"thinking": last["thinking"], "non_thinking": last["non-thinking"]}
    return {"budget_curve": rows, "budget_references": references}


def _students(bench: _Bench) -> list[dict[str, Any]]:
    """One start, two ways on: pass@1, pass@k and what each cost."""
    tasks = benchmarks.problems(bench.inputs["tasks"], "reasoning", bench.config.pass_problems)
    rows = []
    for method, role in STUDENTS.items():
        engine, tokenizer = bench.open(role)
        seed = seed_of(bench.config.seed, "students")
        first, many = benchmarks.pass_curve(
            engine, tokenizer, tasks, bench.config.pass_samples, bench.world, seed
        )
        teacher = bench.inputs["general_rl"] if role == "student_distilled" else None
        spent = cost(bench.inputs[role], teacher)
        rows.append(
            {
                "method": method,
                "stage": role.replace("_", "-"),
                **_numbers(first, "pass_at_1"),
                **_numbers(many, "pass_at_k"),
                "k": bench.config.pass_samples,
                "samples": spent.samples,
                "cost_flops": spent.flops,
            }
        )
    return rows


def _long_context(bench: _Bench) -> list[dict[str, Any]]:
    """Bits per byte and recall at the long length, before and after the long-context stage."""
    rows = []
    for role in BASE_STAGES:
        engine, tokenizer = bench.open(role)
        texts = held_out_texts(
            bench.inputs["shards"], tokenizer, bench.config.long_length, bench.config.long_texts
        )
        model = with_positions(engine.model, 2 * bench.config.long_length)
        bits = mean(benchmarks.bits_per_byte(model, texts, bench.world), bounded=False)
        length = bench.config.long_length
        place = {"after_stage": f"pretrain-{role}"}
        rows.append({**place, "benchmark": "bits_per_byte", "length_tokens": length, **_numbers(bits)})
        tasks = benchmarks.problems(bench.inputs["tasks"], "recall", bench.config.limit)
        cell = benchmarks.recall(Engine(model, tokenizer, slots=32), tokenizer, tasks, bench.world)
        rows.append({**place, "benchmark": "recall", "length_tokens": cell.tokens, **_numbers(cell.estimate)})
    return rows


def with_positions(model: Qwen3, positions: int) -> Qwen3:
    """The same weights under a configuration that allows more positions: how a model does beyond its context."""
    longer = Qwen3(replace(model.config, max_positions=max(positions, model.config.max_positions)))
    longer.load_state_dict(model.state_dict())
    return longer.eval()
