"""What the tiny recipe reaches over several seeds: accuracy, modes, budgets, distillation, time and memory.

    python -m benchmarks.tiny [--quick] [--seeds 1 2 3] [--root runs]

Each seed is a run of its own under ROOT/seed-N, from raw documents to the report, with its own initial weights and its
own problems to learn and to be asked; runs that are done are read, not made again. `ours` is the median of the seeds;
there is no peer that does the whole of it. `target` is what the recipe aims at, `reached` says whether the median
does, and `values` has every seed.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pensar.recipe import load

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first seed only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    reports = [report_of(options.recipe, seed, options.root / f"seed-{seed}") for seed in seeds]
    for name, (unit, measure, target, sign) in METRICS.items():
        values = [measure(report) for report in reports]
        ours = statistics.median(values)
        line = {
            "metric": name,
            "ours": round(ours, 4),
            "peer": None,
            "peer_name": "none does the whole recipe",
            "unit": unit,
            "ratio": None,
            "limit": None,
            "percent_of_limit": None,
            "target": target,
            "reached": None if target is None else (ours - target) * sign >= 0,
            "values": dict(zip(map(str, seeds), (round(value, 4) for value in values), strict=True)),
            "date": str(reports[0]["finished"])[:10],
            "machine": machine(reports[0]),
        }
        print(json.dumps(line), flush=True)


def report_of(recipe: Path, seed: int, root: Path) -> Report:
    """Runs the recipe with the seed, or goes on where it stopped, and reads its report."""
    command = ["run", str(recipe), "--root", str(root), "--quiet"]
    seeded = ["--set", f"seed={seed}", "--set", f"tasks.seed={seed}"]
    subprocess.run([sys.executable, "-m", "pensar", *command, *seeded], check=True, stdout=sys.stderr)
    found: Report = json.loads((root / load(recipe).name / "report" / "report.json").read_text())
    return found


def score(stage: str, benchmark: str, mode: str) -> Callable[[Report], float]:
    """Points of one cell of the stage table."""

    def measure(report: Report) -> float:
        for row in report["stage_table"]:
            if (row["after_stage"], row["benchmark"], row["mode"]) == (stage, benchmark, mode):
                return 100 * float(row["score"])
        raise KeyError(f"no {benchmark} in {mode} mode after {stage} in the stage table")

    return measure


def lift(benchmark: str, mode: str) -> Callable[[Report], float]:
    """Points that general reinforcement learning adds to fusion."""
    before, after = score("fusion", benchmark, mode), score("general-rl", benchmark, mode)
    return lambda report: after(report) - before(report)


def validation(stage: str, key: str) -> Callable[[Report], float]:
    """A figure of the validation problems before or after reasoning RL."""
    return lambda report: next(100 * row[key] for row in report["validation"] if row["stage"] == stage)


def long_context(benchmark: str) -> Callable[[Report], tuple[float, float]]:
    """Scores before and after the long-context stage."""

    def measure(report: Report) -> tuple[float, float]:
        rows = {r["after_stage"]: r["score"] for r in report["long_context"] if r["benchmark"] == benchmark}
        return rows["pretrain-reasoning"], rows["pretrain-long"]

    return measure


def gap(report: Report) -> float:
    """Points between the thinking and the non-thinking mode of the final model."""
    return 100 * float(report["headline"]["mode_gap"])


def above_chance(report: Report) -> float:
    """Points of the final model without thinking above blind guesses: one in ten digits, one in two of the rest."""
    rows = [row for row in report["stage_table"] if row["after_stage"] == "general-rl"]
    row = next(r for r in rows if (r["benchmark"], r["mode"]) == ("reasoning", "non-thinking"))
    guess = {"chain": 0.1, "logic": 0.5, "parity": 0.5}
    return 100 * statistics.mean(float(value) - guess[family] for family, value in row["families"].items())


def worst_fall(report: Report) -> float:
    """Points by which an accuracy of the budget curve lies below any earlier one beyond their intervals; 0 for none."""
    falls = (
        float(before["low"]) - float(after["high"])
        for before, after in itertools.combinations(report["budget_curve"], 2)
    )
    return 100 * max([0.0, *falls])


def budget_start(report: Report) -> float:
    """Points by which a budget of nothing differs from the non-thinking mode."""
    references = report["budget_references"]
    return 100 * abs(float(report["budget_curve"][0]["accuracy"]) - float(references["non_thinking"]))


def budget_end(report: Report) -> float:
    """Points by which the largest budget falls short of thinking without one."""
    last = float(report["budget_curve"][-1]["accuracy"])
    return 100 * (float(report["budget_references"]["thinking"]) - last)


def machine(report: Report) -> str:
    """Processor, processes and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    ranks = report["headline"]["ranks"]
    return f"{processor}, {os.cpu_count()} cores, {ranks} processes, torch {torch.__version__}"


METRICS: dict[str, tuple[str, Callable[[Report], float], float | None, int]] = {
    "thinking": ("%", score("general-rl", "reasoning", "thinking"), 95.0, 1),
    "non_thinking": ("%", score("general-rl", "reasoning", "non-thinking"), None, 1),
    "mode_gap": ("points", gap, 40.0, 1),
    "non_thinking_above_chance": ("points", above_chance, 5.0, 1),
    "think_follow": ("%", lambda report: 100 * report["think_follow"]["score"], 98.0, 1),
    "cold_start_validation": ("%", validation("cold-start", "score"), None, 1),
    "reasoning_rl_validation": ("%", validation("reasoning-rl", "score"), None, 1),
    "reasoning_rl_lift": ("points", lambda report: 100 * report["headline"]["rl"]["points"], 30.0, 1),
    "pass_at_64_before_rl": ("%", validation("cold-start", "pass_at_k"), None, 1),
    "pass_at_64_after_rl": ("%", validation("reasoning-rl", "pass_at_k"), None, 1),
    "think_follow_lift": ("points", lift("think_follow", "flags"), 0.0, 1),
    "forms_thinking_lift": ("points", lift("instructions", "thinking"), 0.0, 1),
    "forms_direct_lift": ("points", lift("instructions", "non-thinking"), 0.0, 1),
    "tools_thinking_lift": ("points", lift("tools", "thinking"), 0.0, 1),
    "tools_direct_lift": ("points", lift("tools", "non-thinking"), 0.0, 1),
    "forms_thinking": ("%", score("general-rl", "instructions", "thinking"), None, 1),
    "tools_thinking": ("%", score("general-rl", "tools", "thinking"), None, 1),
    "budget_worst_fall": ("points", worst_fall, 0.0, -1),
    "budget_start_off_non_thinking": ("points", budget_start, 10.0, -1),
    "budget_end_short_of_thinking": ("points", budget_end, 3.0, -1),
    "distillation_gain_over_rl": ("points", lambda r: 100 * r["headline"]["distillation_gain"], 0.0, 1),
    "distillation_samples_of_rl": (
        "share",
        lambda report: report["headline"]["student_distilled"]["samples_ratio"],
        0.3334,
        -1,
    ),
    "long_documents_before": ("bits per byte", lambda r: long_context("bits_per_byte")(r)[0], None, -1),
    "long_documents_after": ("bits per byte", lambda r: long_context("bits_per_byte")(r)[1], None, -1),
    "long_documents_change": (
        "bits per byte",
        lambda r: long_context("bits_per_byte")(r)[1] - long_context("bits_per_byte")(r)[0],
        0.0,
        -1,
    ),
    "long_recall_before": ("%", lambda r: 100 * long_context("recall")(r)[0], None, 1),
    "long_recall_after": ("%", lambda r: 100 * long_context("recall")(r)[1], 60.0, 1),
    "minutes": ("minutes", lambda report: report["headline"]["seconds"] / 60, 12.0, -1),
    "peak_memory": ("GiB", lambda report: report["headline"]["peak_memory_bytes"] / 2**30, 4.0, -1),
}
"""Metric -> unit, how it is read from a report, what the recipe aims at, and 1 where more is better."""


if __name__ == "__main__":
    main()
