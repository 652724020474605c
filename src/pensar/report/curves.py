"""Charts of lines: loss over all stages, one stage's rewards, accuracy against thinking budget."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from pensar.report.charts import (
    CHARACTER,
    NARROW,
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
from pensar.report.contents import BudgetPoint, References, Training
from pensar.report.html import Markup, element
from pensar.report.numbers import count, interval, percent, short, significant

LOSS, DIVERGENCE = "loss", "divergence"
LEAST_BAND = 0.045
"""Least share of the axis for a stage, so that a short one can be seen."""
LOG_FROM = 8.0
"""Ratio of highest to lowest value from which the axis is logarithmic."""
EVEN_FROM = 24.0
"""Ratio of highest to lowest budget from which budgets stand evenly spaced."""
LINE_HEIGHT = 14.0
SMOOTH = 24
"""A running mean reaches such a part of the points to either side; none for a shorter series."""


def loss_chart(trainings: Sequence[Training], width: float) -> Markup:
    """Loss of every training stage on one axis; each stage has a band as wide as the tokens it learnt from."""
    slanted = width > NARROW
    top, height = (92.0, 416.0) if slanted else (28.0, 316.0)
    values = [y for stage in trainings for name in (LOSS, DIVERGENCE) for _, y in stage.series.get(name, [])]
    positive = [y for y in values if y > 0]
    logarithmic = bool(positive) and len(positive) == len(values) and max(values) > LOG_FROM * min(values)
    low = min(values, default=0.0) * 0.9 if logarithmic else 0.0
    y = Scale(low, max(values, default=1.0) * 1.05 or 1.0, height - 44, top, logarithmic)
    frame = Frame(Scale(0, 1, 44, width - (104 if slanted else 8)), y)
    marks: list[Markup] = []
    bands = list(zip(trainings, pairwise(_edges(trainings)), strict=True))
    for number, (stage, edges) in enumerate(bands, start=1):
        marks += _band(stage, number, frame.x(edges[0]), frame.x(edges[1]), frame, slanted)
    marks += y_axis(frame, log_ticks(y.low, y.high) if logarithmic else ticks(y.low, y.high), significant)
    for stage, edges in bands:
        marks += _losses(stage, frame, *edges)
    marks += [
        line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"),
        text(frame.left, height - 6, "tokens learnt from, by stage", "tick"),
    ]
    return picture(width, height, "Loss over all training stages", marks)


def reward_chart(stage: Training, families: dict[str, str], width: float = 420) -> Markup:
    """Reward over the steps of one stage: all tasks together, and each family with its name at the line's end."""
    lines = [("reward", "all" if len(families) > 1 else "", "line strong")]
    if len(families) > 1:
        lines = [(name, label, "line thin") for name, label in families.items()] + lines
    ends = {name: stage.series[name][-1][1] for name, _, _ in lines}
    labels = [f"{label} {percent(ends[name], 0)}".strip() for name, label, _ in lines]
    bottom = max(206, 12 + LINE_HEIGHT * len(lines))
    right = width - max(len(label) for label in labels) * CHARACTER - 20
    frame = Frame(Scale(*_steps(stage), 38, right), Scale(0, 1, bottom, 12))
    marks = [*y_axis(frame, [0, 0.25, 0.5, 0.75, 1], percent), *_step_axis(frame)]
    places = spread([frame.y(end) for end in ends.values()], LINE_HEIGHT, frame.top + 4, frame.bottom)
    for (name, _, class_), shown, place in zip(lines, labels, places, strict=True):
        marks.append(trace([frame.at(point) for point in stage.series[name]], class_, shown))
        marks.append(
            text(right + 6, place + 4, shown, "label strong" if class_ == "line strong" else "label")
        )
    return picture(width, bottom + 34, f"Reward over the steps of {stage.stage}", marks)


def value_chart(
    stage: Training, name: str, shown: Callable[[float], str] = significant, width: float = 220
) -> Markup:
    """One value over the steps of one stage, from zero."""
    points = stage.series[name]
    values = [y for _, y in points]
    frame = Frame(
        Scale(*_steps(stage), 42, width - 10), Scale(min(0.0, *values), max(max(values) * 1.1, 1e-9), 206, 12)
    )
    marks = [*y_axis(frame, ticks(frame.y.low, frame.y.high, 4), shown), *_step_axis(frame)]
    marks.append(trace([frame.at(point) for point in points], "line strong"))
    return picture(width, 240, f"{name} over the steps of {stage.stage}", marks)


def budget_chart(points: Sequence[BudgetPoint], references: References, width: float) -> Markup:
    """Accuracy against thinking budget with its intervals, between the two modes' own accuracies."""
    narrow = width <= NARROW
    height = 320.0 if narrow else 360.0
    places = _budget_places(points)
    across = Scale(0, max(places[-1], 1e-9), 50, width - (22 if narrow else 168))
    frame = Frame(across, Scale(0, 1, height - 44, 24))
    marks = y_axis(frame, [0, 0.25, 0.5, 0.75, 1], percent)
    named = dict(zip(places, (count(point.budget) for point in points), strict=True))
    marks += x_axis(frame, _apart(places, frame, 30), named.__getitem__)
    marks.append(
        text((frame.left + frame.right) / 2, height - 8, "thinking budget, tokens", "tick", "middle")
    )
    marks += _references(references, frame, narrow)
    whole = [
        (place, point.low, point.high)
        for place, point in zip(places, points, strict=True)
        if point.low is not None and point.high is not None
    ]
    if len(whole) > 1:
        upper = [frame.at((place, high)) for place, _, high in whole]
        lower = [frame.at((place, low)) for place, low, _ in whole]
        marks.append(area(upper, lower, "area thinking"))
    spots = [frame.at((place, point.accuracy)) for place, point in zip(places, points, strict=True)]
    marks.append(trace(spots, "line thinking"))
    labelled = set(_apart(places, frame, 42))
    for place, spot, point in zip(places, spots, points, strict=True):
        span = interval(point.low, point.high)
        title = f"budget {count(point.budget)}: {percent(point.accuracy)}" + (f" ({span})" if span else "")
        marks.append(dot(spot, "dot thinking", title))
        if place in labelled:
            marks.append(_point_label(spot, percent(point.accuracy, 0), frame))
    return picture(width, height, "Accuracy against thinking budget", marks)


def _budget_places(points: Sequence[BudgetPoint]) -> list[float]:
    """Budgets on a linear axis; evenly spaced where they spread over orders of magnitude."""
    budgets = [point.budget for point in points]
    least = min((budget for budget in budgets if budget > 0), default=1)
    even = budgets[-1] > EVEN_FROM * least
    return [float(place) for place in (range(len(budgets)) if even else budgets)]


def _apart(places: Sequence[float], frame: Frame, gap: float) -> list[float]:
    """Those of the places, last one first, that keep `gap` pixels between them."""
    kept: list[float] = []
    for place in reversed(places):
        if not kept or frame.x(kept[-1]) - frame.x(place) >= gap:
            kept.append(place)
    return kept


def _point_label(at: Point, content: str, frame: Frame) -> Markup:
    x, y = at
    above = y - 12 > frame.top + 6
    return text(x, y - 10 if above else y + 20, content, "label halo", "middle")


def _references(references: References, frame: Frame, narrow: bool) -> list[Markup]:
    """Dashed lines of both modes, named at the right or, on a phone, on the line."""
    lines = [("thinking", references.thinking), ("non-thinking", references.non_thinking)]
    shown = [(mode, value) for mode, value in lines if value is not None]
    if not shown:
        return []
    places = spread([frame.y(value) for _, value in shown], 32, frame.top, frame.bottom - 14)
    marks = []
    for (mode, value), place in zip(shown, places, strict=True):
        y = frame.y(value)
        marks.append(line(frame.left, y, frame.right, y, f"reference {mode}"))
        if narrow:
            at = y - 5 if mode == "thinking" else y + 15
            marks.append(text(frame.right, at, f"{mode} {percent(value)}", f"label {mode} halo", "end"))
        else:
            own = "to its own end" if mode == "thinking" else "answers at once"
            marks.append(text(frame.right + 22, place + 4, f"{mode} {percent(value)}", f"label {mode}"))
            marks.append(text(frame.right + 22, place + 18, own, "tick"))
    return marks


def _edges(trainings: Sequence[Training]) -> list[float]:
    """Borders of the stages' bands from 0 to 1: a share of the tokens above a least width."""
    total = sum(stage.tokens for stage in trainings)
    least = min(LEAST_BAND, 0.6 / max(len(trainings), 1))
    free = 1 - least * len(trainings)
    edges = [0.0]
    for stage in trainings:
        share = stage.tokens / total if total else 1 / len(trainings)
        edges.append(edges[-1] + least + free * share)
    return edges


def _band(
    stage: Training, number: int, left: float, right: float, frame: Frame, slanted: bool
) -> list[Markup]:
    """The stage's stretch of the axis, shaded in turn, with its name and its tokens."""
    shade = "band odd" if number % 2 else "band"
    title = element("title", f"{stage.stage}: {count(stage.steps)} steps, {count(stage.tokens)} tokens")
    height = frame.bottom - frame.top
    marks = [element("rect", title, x=left, y=frame.top, width=right - left, height=height, class_=shade)]
    middle = (left + right) / 2
    if slanted:
        turn = f"rotate(-38 {middle:.1f} {frame.top - 8:.1f})"
        marks.append(text(middle, frame.top - 8, f"{number} {stage.stage}", "label", transform=turn))
    else:
        marks.append(text(middle, frame.top - 8, str(number), "label", "middle"))
    amount = short(stage.tokens)
    if right - left > len(amount) * CHARACTER + 4:
        marks.append(text(middle, frame.bottom + 14, amount, "tick", "middle"))
    if LOSS not in stage.series and DIVERGENCE not in stage.series:
        turn = f"rotate(-90 {middle + 4:.1f} {frame.bottom - 10:.1f})"
        marks.append(text(middle + 4, frame.bottom - 10, "rewards below", "tick", transform=turn))
    return marks


def _losses(stage: Training, frame: Frame, left: float, right: float) -> list[Markup]:
    """The stage's cross-entropy as a line and its divergence from the teacher as a dashed one."""
    first, last = _steps(stage)
    across = Scale(first, last, left, right)
    marks = []
    for name, class_ in ((LOSS, "line strong"), (DIVERGENCE, "line dashed")):
        values = stage.series.get(name, [])
        points = [frame.at((across(step), y)) for step, y in values]
        calm = [frame.at((across(step), y)) for step, y in smoothed(values)]
        if calm != points:
            marks.append(trace(points, "line faint"))
            points = calm
        if points:
            marks.append(
                trace(points, class_, f"{stage.stage}: {name} {significant(stage.last[name])} at the end")
            )
    return marks


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Running means of a long series, so that its course shows through the noise of single steps."""
    reach = len(points) // SMOOTH
    calm = []
    for index, (x, _) in enumerate(points):
        half = min(reach, index, len(points) - 1 - index)
        near = points[index - half : index + half + 1]
        calm.append((x, sum(y for _, y in near) / len(near)))
    return calm


def _steps(stage: Training) -> Point:
    """First and last step of the record."""
    steps = [step for points in stage.series.values() for step in (points[0][0], points[-1][0])]
    return min(steps, default=0.0), max(steps, default=1.0)


def _step_axis(frame: Frame) -> list[Markup]:
    room = max(2, round((frame.right - frame.left) / 60))
    marks = x_axis(frame, ticks(frame.x.low, frame.x.high, room), short)
    return [*marks, text(frame.right, frame.bottom + 30, "step", "tick", "end")]
