"""The section on learned thinking budgets: there where a run has them, with the numbers of the stage's own curve."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from report_run import make_run

from pensar.base.errors import DataError
from pensar.base.files import write_jsonl
from pensar.base.manifest import InputEntry, folder_name, read_manifest, write_manifest
from pensar.evaluate.statistics import share
from pensar.report import write
from pensar.report.collect import BUDGETS, collect
from pensar.report.contents import LearnedBudgets, Report, WayPoint
from pensar.report.page import render
from pensar.report.sections.budgets import gain, ways_chart

QUESTIONS = 200
FIXED = [(0.5, 19, 142, 17.0), (0.8, 26, 167, 20.0), (0.95, 32, 190, 22.0)]
LEARNED = [(0.5, 18.5, 150, 16.0), (0.8, 21.25, 176, 19.0), (0.95, 24.265, 193, 21.0)]
"""Share, mean budget, right answers and mean tokens of thinking."""


def rows() -> list[dict[str, Any]]:
    row: dict[str, Any] = {"way": "unlimited", "share": 1.0, "budget": None, "right": 192}
    found = [row | {"questions": QUESTIONS, "reasoning_tokens": 23.0, "sufficed": 1.0}]
    for way, points in (("fixed", FIXED), ("learned", LEARNED)):
        for part, budget, right, thought in points:
            row = {"way": way, "share": part, "budget": budget, "right": right, "questions": QUESTIONS}
            found.append(row | {"reasoning_tokens": thought, "sufficed": part})
    return found


@pytest.fixture
def learned_run(tmp_path: Path) -> Path:
    """A complete run in which a stage learned budgets for the last model."""
    run = make_run(tmp_path / "tiny")
    before = next(run.glob("general-rl-*"))
    manifest = read_manifest(before)
    fingerprint = "7" * 64
    folder = run / folder_name("thinking-budget", fingerprint)
    folder.mkdir()
    write_jsonl(folder / BUDGETS, rows())
    model = InputEntry(stage="general-rl", fingerprint=manifest.fingerprint, folder=before.name)
    own = {"stage": "thinking-budget", "fingerprint": fingerprint, "inputs": {"model": model}, "counts": {}}
    write_manifest(folder, msgspec.structs.replace(manifest, **own))
    return run


def test_the_stages_numbers_are_reported_with_shares_and_their_intervals(learned_run: Path) -> None:
    found = json.loads(write(learned_run).with_name("report.json").read_bytes())["learned_budgets"]
    assert found["stage"] == "thinking-budget"
    assert [
        {name: point[name] for name in row} for point, row in zip(found["points"], rows(), strict=True)
    ] == rows()
    for point in found["points"]:
        wilson = share(point["right"], QUESTIONS)
        assert (point["accuracy"], point["low"], point["high"]) == (wilson.score, wilson.low, wilson.high)


def test_the_page_has_a_chart_a_table_and_what_is_seen(learned_run: Path) -> None:
    page = write(learned_run).read_text("utf-8")
    assert '<a href="#learned-budgets">learned budgets</a>' in page
    assert page.index('id="budget"') < page.index('id="learned-budgets"') < page.index('id="distillation"')
    section = page[page.index('id="learned-budgets"') : page.index('id="distillation"')]
    assert section.count("<svg") == 2, "for a desk and for a phone"
    assert "200 held-out questions" in section
    assert "learned, to suffice for 95%: 96.5% (93.0–98.3), 21 tokens" in section
    assert '<td class="number">24.3</td>' in section
    # Beyond the lowest of the others nothing is said; at 19 and 21 tokens these lie between 71, 83.5 and 95%.
    expected = np.mean([88 - (71 + 2 / 3 * 12.5), 96.5 - (83.5 + 95) / 2])
    assert f"learned budgets are right {expected:.1f} points more often" in section
    assert "beyond the 95% intervals" in section
    decoded = msgspec.json.decode((learned_run / "report" / "report.json").read_bytes(), type=Report)
    assert render(decoded) == page


def test_a_run_without_the_stage_has_no_such_section(run_folder: Path) -> None:
    page = write(run_folder)
    assert "learned-budgets" not in page.read_text("utf-8")
    assert json.loads(page.with_name("report.json").read_bytes())["learned_budgets"] is None


def points(way: str, values: list[tuple[float, int]]) -> list[WayPoint]:
    """Points of one way at tokens thought and right answers of 100."""
    return [
        msgspec.convert(
            {"way": way, "share": 0.5, "budget": None if way == "unlimited" else thought, "right": right,
             "questions": 100, "reasoning_tokens": thought, "sufficed": 1.0, "accuracy": right / 100,
             "low": right / 100 - 0.05, "high": right / 100 + 0.02},
            WayPoint,
        )
        for thought, right in values
    ]  # fmt: skip


def test_ways_are_compared_where_they_thought_as_much() -> None:
    rng = np.random.default_rng(3)
    thought, right = np.sort(rng.uniform(10, 40, 6)), np.sort(rng.integers(40, 96, 6))
    fixed = points("fixed", list(zip(thought[:-1].tolist(), right[:-1].tolist(), strict=True)))
    last = points("unlimited", [(float(thought[-1]), int(right[-1]))])
    own = points(
        "learned",
        [(float(x), int(y)) for x, y in zip(rng.uniform(10, 40, 8), rng.integers(40, 96, 8), strict=True)],
    )
    inside = [p for p in own if thought[0] <= p.reasoning_tokens <= thought[-1]]
    assert inside
    expected = np.mean([p.accuracy - np.interp(p.reasoning_tokens, thought, right / 100) for p in inside])
    assert gain(LearnedBudgets(stage="s", points=[*own, *last, *fixed])) == pytest.approx(expected)
    far = points("learned", [(100.0, 50)])
    assert gain(LearnedBudgets(stage="s", points=[*far, *last, *fixed])) is None


@pytest.mark.parametrize("width", [920, 380])
def test_dots_stand_at_tokens_thought_and_accuracy(width: float) -> None:
    both = points("fixed", [(10.0, 60), (30.0, 90)]) + points("learned", [(10.0, 80), (20.0, 90)])
    own = LearnedBudgets(stage="s", points=[*both, *points("unlimited", [(30.0, 90)])])
    chart = ways_chart(own, width)
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+" class="dot (\w+)"', chart)
    learned = [(float(x), float(y)) for x, y, way in found if way == "thinking"]
    fixed = [(float(x), float(y)) for x, y, way in found if way == "strong"]
    assert len(learned) == len(fixed) == 3
    assert fixed[0][0] == learned[0][0]
    assert learned[1][0] - learned[0][0] == pytest.approx((fixed[1][0] - fixed[0][0]) / 2, abs=0.02)
    assert learned[1][1] == fixed[1][1]
    assert fixed[0][1] - learned[0][1] == pytest.approx((fixed[0][1] - fixed[1][1]) * 2 / 3, abs=0.02)
    # Values and axes: what is drawn is inside.
    assert all(50 <= float(x) <= width - 22 and 24 <= float(y) <= 316 for x, y, _ in found)


def test_a_curve_that_cannot_be_read_is_named(learned_run: Path) -> None:
    path = next(learned_run.glob("thinking-budget-*")) / BUDGETS
    path.write_text('{"way": "fixed", "share": 0.5}\n')
    with pytest.raises(DataError, match=r"budget_curve\.jsonl:1: not a row of WayPoint"):
        collect(learned_run)


@pytest.mark.parametrize("kept", [["unlimited"], ["learned"], ["fixed"]])
def test_a_curve_of_one_way_alone_is_drawn_without_a_comparison(learned_run: Path, kept: list[str]) -> None:
    path = next(learned_run.glob("thinking-budget-*")) / BUDGETS
    write_jsonl(path, [row for row in rows() if row["way"] in kept])
    page = write(learned_run).read_text("utf-8")
    section = page[page.index('id="learned-budgets"') : page.index('id="distillation"')]
    assert "often" not in section
    assert section.count("<svg") == 2
