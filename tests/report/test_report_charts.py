"""Scales, ticks, labels, numbers and the layout of the lineage graph."""

import math
import re
from itertools import pairwise

import pytest

from pensar.report.charts import Scale, log_ticks, spread, ticks
from pensar.report.contents import BudgetPoint, References, StageRow, Training
from pensar.report.curves import budget_chart, loss_chart, smoothed
from pensar.report.html import Markup, element, escape
from pensar.report.intervals import Mark, Row, interval_chart
from pensar.report.lineage import lineage_chart
from pensar.report.numbers import (
    count,
    duration,
    listing,
    multiple,
    percent,
    plural,
    points,
    scientific,
    short,
    significant,
    size,
)


def stage(name: str, *inputs: str) -> StageRow:
    return StageRow(
        name=name, folder=name, fingerprint="0" * 64, revision=1, seconds=1.0, cpu_seconds=1.0, ranks=1,
        peak_memory_bytes=1, inputs={role: role for role in inputs},
    )  # fmt: skip


def test_a_logarithmic_scale_puts_equal_ratios_at_equal_distances() -> None:
    scale = Scale(0.1, 10, 100, 0, logarithmic=True)
    assert [scale(0.1), scale(1), scale(10)] == pytest.approx([100, 50, 0])
    assert Scale(3, 3, 0, 10)(3) == 5


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.37), (-2, 9), (1.41, 1.79), (0, 48), (0, 3_000_000)])
def test_ticks_are_round_evenly_spaced_and_inside(low: float, high: float) -> None:
    values = ticks(low, high)
    steps = {round(after - before, 9) for before, after in pairwise(values)}
    assert len(steps) == 1
    assert 2 <= len(values) <= 7
    assert low <= values[0] <= values[-1] <= high
    assert f"{steps.pop():e}"[0] in "125"


def test_logarithmic_ticks_are_one_two_five() -> None:
    assert log_ticks(0.1, 8) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])


def test_labels_keep_their_order_and_their_distance() -> None:
    moved = spread([50.0, 52.0, 51.0, 90.0], 14, 0, 100)
    ranked = sorted(moved)
    assert all(after - before >= 14 - 1e-9 for before, after in pairwise(ranked))
    assert sorted(range(4), key=moved.__getitem__) == [0, 2, 1, 3]
    assert max(moved) <= 100


def test_a_running_mean_keeps_the_ends_and_calms_the_middle() -> None:
    noisy = [(float(x), 1.0 + (-1) ** x) for x in range(121)]
    calm = smoothed(noisy)
    assert (calm[0], calm[-1]) == (noisy[0], noisy[-1])
    assert abs(calm[60][1] - 1.0) < 0.2
    assert smoothed(noisy[:20]) == noisy[:20]


def test_the_band_of_a_stage_is_wider_the_more_tokens_it_learnt_from() -> None:
    def training(name: str, tokens: int) -> Training:
        series = {"loss": [(0.0, 2.0), (9.0, 1.0)]}
        ends = {"loss": 2.0}
        return Training(
            stage=name, steps=10, tokens=tokens, finished=True, first=ends, last=ends, series=series
        )

    chart = loss_chart([training("long", 9000), training("short", 1000), training("none", 0)], 900)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', chart)]
    least = widths[2]
    assert (widths[0] - least) / (widths[1] - least) == pytest.approx(9, rel=0.01)
    assert least > 20


def test_budgets_far_apart_stand_evenly_and_near_ones_to_scale() -> None:
    def places(budgets: list[int]) -> list[float]:
        curve = [BudgetPoint(budget=budget, accuracy=0.5) for budget in budgets]
        chart = budget_chart(curve, References(), 900)
        return [float(x) for x in re.findall(r'cx="([\d.]+)"', chart)]

    near = places([0, 10, 40])
    assert (near[2] - near[0]) / (near[1] - near[0]) == pytest.approx(4, rel=0.01)
    far = places([128, 1024, 32768])
    assert far[2] - far[1] == pytest.approx(far[1] - far[0], abs=0.02)


def test_an_interval_is_drawn_where_its_numbers_are() -> None:
    chart = interval_chart([Row("one", (Mark(0.5, 0.25, 0.75),))], "title", width=410)
    low, high = re.findall(r'x1="([\d.]+)"[^>]*x2="([\d.]+)"[^>]*whisker', chart)[0]
    assert (float(low), float(high)) == pytest.approx((10 + 0.25 * 384, 10 + 0.75 * 384), abs=0.01)


def test_the_lineage_graph_has_every_artifact_once_and_no_implied_edge() -> None:
    rows = [
        stage("a"),
        stage("b", "a"),
        stage("c", "b", "a"),
        stage("d", "a"),
        stage("e", "c", "d", "/adopted/model"),
    ]
    chart = lineage_chart(rows)
    names = re.findall(r'class="label">([^<]+)<', chart)
    assert sorted(names) == ["a", "b", "c", "d", "e", "model"]
    # a-b, b-c (one box), c-e, a-d, d-e, model-e; a-c is implied.
    assert len(re.findall(r"m-3.5 -6", chart)) == 5
    found = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', chart)
    boxes = [tuple(map(float, box)) for box in found]
    for number, (x, y, width, height) in enumerate(boxes):
        for x2, y2, width2, height2 in boxes[:number]:
            assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y


def test_text_is_escaped_and_markup_is_not() -> None:
    built = element("p", "a < b & c", element("b", "x"), title='"quoted"', class_="k", hidden=True, lang=None)
    assert built == '<p title="&quot;quoted&quot;" class="k" hidden>a &lt; b &amp; c<b>x</b></p>'
    assert escape("\x07\ud800") == "\ufffd?"
    assert element("td") == "<td></td>"
    assert element("line", x1=1.0, y1=2.345) == '<line x1="1" y1="2.35"/>'
    assert isinstance(built, Markup)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(0.9833), "98.3%"), (percent(1.0), "100%"), (percent(0.99999), ">99.9%"), (percent(0.00001), "<0.1%"),
        (percent(0.0), "0%"), (percent(0.996, 0), ">99%"), (points(0.744), "+74.4"), (points(-0.0204), "\u22122.0"),
        (points(0.0001), "0.0"), (count(12345.4), "12,345"), (short(999_600), "1.00M"), (short(1_246_976), "1.25M"),
        (short(42), "42"), (short(3.4e18), "3.40E"),
        (significant(0.001234), "0.00123"), (significant(12.345), "12.3"), (significant(2.0), "2"),
        (significant(1.7134), "1.71"), (duration(0.42), "0.42 s"), (duration(59.97), "1 min 00 s"),
        (duration(3907), "1 h 05 min"), (size(1.5 * 2**30), "1.5 GiB"), (size(812 * 2**20), "812 MiB"),
        (size(17), "17 B"), (size(2**40), "1.0 TiB"), (duration(0.04), "0.04 s"),
        (multiple(0.25), "1/4"), (multiple(1 / 9.4), "1/9.4"), (multiple(2.13), "2.1×"), (multiple(1.0), "1"),
        (listing(["a", "b", "c"]), "a, b and c"), (listing([]), ""), (plural(1, "reply", "replies"), "1 reply"),
        (plural(2301, "document"), "2,301 documents"),
    ],
)  # fmt: skip
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected


def test_scientific_numbers_have_one_decimal_and_a_raised_exponent() -> None:
    assert scientific(3.24e12).replace("\u202f", " ") == "3.2 × 10¹²"
    assert scientific(0) == "0"
    assert math.isclose(float(scientific(4.4e-3)[:3]), 4.4)
