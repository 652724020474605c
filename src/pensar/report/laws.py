"""Charts of a sweep: losses over learning rates with their quadratics, and optima along the laws through them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pensar.report.charts import (
    CHARACTER,
    Frame,
    Point,
    Scale,
    area,
    dot,
    line,
    log_ticks,
    picture,
    spread,
    text,
    ticks,
    trace,
    x_axis,
    y_axis,
)
from pensar.report.html import Markup
from pensar.report.numbers import short, significant
from pensar.train.optimum import Optimum
from pensar.train.prediction import Cell

SERIES = ("thinking", "non-thinking", "strong", "neutral")
"""Colours of the lines of one chart, in order."""
SAMPLES = 40
"""Points of a drawn curve."""
MARGIN = 1.25
"""Free space beside the outermost values of a logarithmic axis, as a factor."""
HEIGHT = 250.0


@dataclass(frozen=True)
class Spot:
    """An estimate with its interval; a `bound` is drawn as a ring."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    bound: bool = False


@dataclass(frozen=True)
class Curve:
    """Estimates of one kind and, where there is one, the law's line through them with its band."""

    label: str
    spots: tuple[Spot, ...]
    law: tuple[Spot, ...] = ()


def rate_chart(cells: Sequence[Cell], width: float = 420) -> Markup:
    """Losses of one size over the learning rate: for each number of tokens the runs of the batch nearest the best."""
    known = [(cell, cell.optimum) for cell in cells if cell.optimum is not None]
    slices = [_slice(cell, best) for cell, best in known]
    rates = [x for points, _ in slices for x, _ in points]
    losses = [y for points, curve in slices for _, y in [*points, *curve]]
    low, high = min(losses), max(losses)
    labels = [short(cell.tokens) for cell, _ in known]
    right = width - max(len(label) for label in labels) * CHARACTER - 12
    across = Scale(min(rates) / MARGIN, max(rates) * MARGIN, 40, right, logarithmic=True)
    up = Scale(low - 0.08 * (high - low or 1), high + 0.05 * (high - low or 1), HEIGHT - 42, 12)
    frame = Frame(across, up)
    marks = [*y_axis(frame, ticks(up.low, up.high, 5), significant)]
    marks += x_axis(frame, log_ticks(across.low, across.high), significant)
    marks.append(text(right, HEIGHT - 6, "learning rate", "tick", "end"))
    places = spread([up(curve[-1][1]) for _, curve in slices], 14, frame.top + 4, frame.bottom)
    for number, ((points, curve), (cell, best)) in enumerate(zip(slices, known, strict=True)):
        class_ = SERIES[number % len(SERIES)]
        marks.append(trace([frame.at(point) for point in curve], f"line {class_}"))
        for x, y in points:
            title = f"{short(cell.tokens)} tokens, learning rate {significant(x)}: loss {significant(y, 4)}"
            marks.append(dot(frame.at((x, y)), f"dot {class_}", title, radius=3))
        lowest = min(curve, key=lambda point: point[1])
        mark = f"best learning rate {significant(best.rate.value)}"
        marks.append(dot(frame.at(lowest), f"ring {class_}", mark, radius=5.5))
        marks.append(text(right + 6, places[number] + 4, labels[number], f"label {class_}"))
    return picture(width, HEIGHT, "Loss against learning rate", marks)


def law_chart(
    curves: Sequence[Curve],
    title: str,
    x_label: str,
    shown: Callable[[float], str] = significant,
    *,
    logarithmic: bool = True,
    width: float = 420,
) -> Markup:
    """Estimates over size or tokens on logarithmic axes, with the law's line and its band."""
    spots = [spot for curve in curves for spot in (*curve.spots, *curve.law)]
    values = [y for spot in spots for y in (spot.y, spot.low, spot.high) if y is not None]
    labels = [curve.label for curve in curves]
    right = width - max(len(label) for label in labels) * CHARACTER - 12
    xs = [spot.x for spot in spots]
    across = Scale(min(xs) / MARGIN, max(xs) * MARGIN, 44, right, logarithmic=True)
    low, high = _ends(values, [spot.y for spot in spots], logarithmic)
    frame = Frame(across, Scale(low, high, HEIGHT - 42, 12, logarithmic=logarithmic))
    values = log_ticks(low, high) if logarithmic else ticks(low, high, 5)
    marks = [*y_axis(frame, values, shown), *x_axis(frame, log_ticks(across.low, across.high), short)]
    marks.append(text(right, HEIGHT - 6, x_label, "tick", "end"))
    ends = [frame.y((curve.law or curve.spots)[-1].y) for curve in curves]
    places = spread(ends, 14, frame.top + 4, frame.bottom)
    for number, (curve, place) in enumerate(zip(curves, places, strict=True)):
        class_ = SERIES[number % len(SERIES)]
        marks += _law(curve, frame, class_)
        marks += [mark for spot in curve.spots for mark in _spot(spot, frame, class_, curve.label, shown)]
        marks.append(text(right + 6, place + 4, curve.label, f"label {class_}"))
    return picture(width, HEIGHT, title, marks)


def _slice(cell: Cell, best: Optimum) -> tuple[list[Point], list[Point]]:
    """Runs of the batch that stands next to the best one, and the quadratic at that batch."""
    finite = [point for point in cell.points if point.loss is not None]
    low, high = best.window
    batch = min((point.batch for point in finite), key=lambda b: abs(math.log(b / best.batch.value)))
    points = sorted(
        (point.rate, point.loss)
        for point in finite
        if point.batch == batch and point.loss is not None and low <= point.rate <= high
    )
    rates = [low * (high / low) ** (step / SAMPLES) for step in range(SAMPLES + 1)]
    return points, [(rate, best.loss_at(rate, batch)) for rate in rates]


def _ends(values: Sequence[float], middles: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """Of the y axis: all that is drawn, but intervals only as far as the picture bears."""
    low, high = min(middles), max(middles)
    if logarithmic:
        reach = max(high / low, 2.0)
        return max(min(values), low / reach) / 1.1, min(max(values), high * reach) * 1.1
    reach = (high - low) or abs(high) or 1.0
    return max(min(values), low - reach) - 0.05 * reach, min(max(values), high + reach) + 0.05 * reach


def _law(curve: Curve, frame: Frame, class_: str) -> list[Markup]:
    if not curve.law:
        return []
    banded = [spot for spot in curve.law if spot.low is not None and spot.high is not None]
    marks = []
    if len(banded) > 1:
        upper = [frame.at((spot.x, _inside(spot.high, frame))) for spot in banded]
        lower = [frame.at((spot.x, _inside(spot.low, frame))) for spot in banded]
        marks.append(area(upper, lower, f"area {class_}"))
    return [*marks, trace([frame.at((spot.x, spot.y)) for spot in curve.law], f"line {class_}")]


def _spot(spot: Spot, frame: Frame, class_: str, label: str, shown: Callable[[float], str]) -> list[Markup]:
    x, y = frame.at((spot.x, spot.y))
    marks = []
    if spot.low is not None and spot.high is not None and not spot.bound:
        ends = (frame.y(_inside(spot.low, frame)), frame.y(_inside(spot.high, frame)))
        marks.append(line(x, ends[0], x, ends[1], f"whisker {class_}"))
    kind = "ring" if spot.bound else "dot"
    what = "a bound, " if spot.bound else ""
    return [*marks, dot((x, y), f"{kind} {class_}", f"{label} at {short(spot.x)}: {what}{shown(spot.y)}")]


def _inside(value: float | None, frame: Frame) -> float:
    assert value is not None
    return min(max(value, frame.y.low), frame.y.high)
