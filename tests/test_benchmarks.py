"""The figures that benchmarks read from a report are the ones a reader would work out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tiny

FAMILIES = {"chain": 0.3, "logic": 0.6, "parity": 0.5}


def cell(stage: str, benchmark: str, mode: str, score: float) -> dict[str, Any]:
    return {"after_stage": stage, "benchmark": benchmark, "mode": mode, "score": score, "families": FAMILIES}


def point(budget: int, accuracy: float, width: float = 0.05) -> dict[str, float]:
    return {"budget": budget, "accuracy": accuracy, "low": accuracy - width, "high": accuracy + width}


@pytest.fixture
def report() -> dict[str, Any]:
    benchmarks = [
        ("instructions", "thinking", 0.5),
        ("instructions", "non-thinking", 0.25),
        ("tools", "thinking", 0.75),
    ]
    benchmarks += [("tools", "non-thinking", 0.5), ("think_follow", "flags", 0.875)]
    fusion = [cell("fusion", *row) for row in benchmarks]
    general = [cell("general-rl", name, mode, score + 0.125) for name, mode, score in benchmarks]
    reasoning = [("thinking", 0.96875), ("non-thinking", 0.5)]
    after = [cell("general-rl", "reasoning", mode, score) for mode, score in reasoning]
    long = [("pretrain-reasoning", "bits_per_byte", 1.5), ("pretrain-long", "bits_per_byte", 1.25)]
    long += [("pretrain-reasoning", "recall", 0.125), ("pretrain-long", "recall", 0.75)]
    return {
        "stage_table": fusion + general + after,
        "validation": [
            {"stage": "cold-start", "score": 0.25, "pass_at_k": 0.875},
            {"stage": "reasoning-rl", "score": 0.75, "pass_at_k": 1.0},
        ],
        "long_context": [{"after_stage": s, "benchmark": b, "score": value} for s, b, value in long],
        "budget_curve": [point(0, 0.5), point(8, 0.75), point(16, 0.625), point(32, 0.9375)],
        "budget_references": {"non_thinking": 0.53125, "thinking": 0.96875},
        "think_follow": {"score": 0.984375},
        "headline": {
            "mode_gap": 0.46875,
            "rl": {"points": 0.5},
            "distillation_gain": 0.125,
            "student_distilled": {"samples_ratio": 0.3125},
            "seconds": 600.0,
            "peak_memory_bytes": 3 * 2**29,
            "ranks": 2,
        },
        "finished": "2026-01-02T03:04:05Z",
    }


BY_HAND = {
    "thinking": 96.875,
    "non_thinking": 50.0,
    "mode_gap": 46.875,
    "non_thinking_above_chance": 100 * (0.2 + 0.1 + 0.0) / 3,
    "think_follow": 98.4375,
    "cold_start_validation": 25.0,
    "reasoning_rl_validation": 75.0,
    "reasoning_rl_lift": 50.0,
    "pass_at_64_before_rl": 87.5,
    "pass_at_64_after_rl": 100.0,
    "think_follow_lift": 12.5,
    "forms_thinking_lift": 12.5,
    "forms_direct_lift": 12.5,
    "tools_thinking_lift": 12.5,
    "tools_direct_lift": 12.5,
    "forms_thinking": 62.5,
    "tools_thinking": 87.5,
    "budget_worst_fall": 2.5,
    "budget_start_off_non_thinking": 3.125,
    "budget_end_short_of_thinking": 3.125,
    "distillation_gain_over_rl": 12.5,
    "distillation_samples_of_rl": 0.3125,
    "long_documents_before": 1.5,
    "long_documents_after": 1.25,
    "long_documents_change": -0.25,
    "long_recall_before": 12.5,
    "long_recall_after": 75.0,
    "minutes": 10.0,
    "peak_memory": 1.5,
}


def test_the_figures_of_the_tiny_recipe(report: dict[str, Any]) -> None:
    read = {name: measure(report) for name, (_, measure, _, _) in tiny.METRICS.items()}
    assert read == pytest.approx(BY_HAND)


def test_a_curve_that_only_rises_has_no_fall(report: dict[str, Any]) -> None:
    report["budget_curve"] = [point(0, 0.5), point(8, 0.75), point(16, 0.70)]
    assert tiny.worst_fall(report) == 0.0  # within the intervals


def test_a_cell_that_the_report_lacks_is_named(report: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="no reasoning in thinking mode after fusion"):
        tiny.score("fusion", "reasoning", "thinking")(report)


def test_lines_say_whether_the_median_reaches_its_aim(
    report: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    scores = {1: 0.9, 2: 0.96, 3: 0.99}

    def run(recipe: Path, seed: int, root: Path) -> dict[str, Any]:
        assert root == tmp_path / f"seed-{seed}"
        table = [row | {"score": scores[seed]} for row in report["stage_table"]]
        minutes = report["headline"] | {"seconds": 60.0 * (10 + seed)}
        return report | {"stage_table": table, "headline": minutes}

    monkeypatch.setattr(tiny, "report_of", run)
    monkeypatch.setattr("sys.argv", ["tiny", "--root", str(tmp_path)])
    tiny.main()
    lines = {row["metric"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert lines["thinking"]["ours"] == 96.0
    assert lines["thinking"]["reached"] is True
    assert lines["thinking"]["values"] == {"1": 90.0, "2": 96.0, "3": 99.0}
    assert (lines["minutes"]["ours"], lines["minutes"]["reached"]) == (12.0, True)
    assert lines["budget_worst_fall"]["reached"] is False
    assert lines["non_thinking"]["reached"] is None
    assert all(row["date"] == "2026-01-02" for row in lines.values())
