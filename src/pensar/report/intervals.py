"""Charts of estimates: one row each, a dot with its 95% interval on a common axis."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pensar.report.charts import CHARACTER, Frame, Scale, dot, line, picture, text, ticks
from pensar.report.contents import Method, Validation
from pensar.report.html import Markup
from pensar.report.numbers import percent

ROW = 46.0
ALONE = 640.0
"""Width for a desk of a chart that stands alone."""


@dataclass(frozen=True)
class Mark:
    """A value with its interval, if it has one; `class_` gives the colour, `hollow` a ring instead of a disc."""

    value: float
    low: float | None = None
    high: float | None = None
    class_: str = "neutral"
    hollow: bool = False
    label: str = ""
    """Stands beside the value, such as the name of what is marked."""


@dataclass(frozen=True)
class Row:
    label: str
    marks: tuple[Mark, ...]


def pass_at_k(row: Method | Validation) -> list[Mark]:
    """The chance that one of k samples is right, as a ring; empty where it was not measured."""
    if row.pass_at_k is None:
        return []
    label = f"pass@{row.k}"
    return [Mark(row.pass_at_k, row.pass_at_k_low, row.pass_at_k_high, hollow=True, label=label)]


def interval_chart(
    rows: Sequence[Row],
    title: str,
    shown: Callable[[float], str] = percent,
    limits: tuple[float, float] | None = (0.0, 1.0),
    width: float = 420,
) -> Markup:
    """Rows of dots with whiskers; each row's name stands above it, so that names may be long."""
    values = [
        edge
        for row in rows
        for mark in row.marks
        for edge in (mark.value, mark.low, mark.high)
        if edge is not None
    ]
    if limits is None:
        span = (max(values) - min(values)) or abs(max(values)) or 1.0
        limits = min(values) - 0.15 * span, max(values) + 0.15 * span
    height = ROW * len(rows) + 30
    frame = Frame(Scale(*limits, 10, width - 16), Scale(0, 1, height - 22, 4))
    marks: list[Markup] = []
    for value in [0, 0.25, 0.5, 0.75, 1] if limits == (0.0, 1.0) else ticks(*limits, 4):
        x = frame.x(value)
        marks.append(line(x, frame.top, x, frame.bottom, "grid"))
        marks.append(text(x, height - 6, shown(value), "tick", "middle"))
    for number, row in enumerate(rows):
        marks += _row(row, frame, frame.top + ROW * number, shown)
    return picture(width, height, title, marks)


def _row(row: Row, frame: Frame, top: float, shown: Callable[[float], str]) -> list[Markup]:
    y = top + 32
    marks = [text(frame.left, top + 16, row.label, "label halo"), line(frame.left, y, frame.right, y, "rail")]
    for mark in row.marks:
        x = frame.x(mark.value)
        if mark.low is not None and mark.high is not None:
            marks.append(line(frame.x(mark.low), y, frame.x(mark.high), y, f"whisker {mark.class_}"))
        kind = "ring" if mark.hollow else "dot"
        value = shown(mark.value)
        marks.append(dot((x, y), f"{kind} {mark.class_}", f"{row.label}, {mark.label or 'value'}: {value}"))
    return [*marks, *_values(row, frame, top + 16, shown)]


def _values(row: Row, frame: Frame, y: float, shown: Callable[[float], str]) -> list[Markup]:
    """The row's values at the right end, last mark rightmost."""
    marks: list[Markup] = []
    x = frame.right
    for mark in reversed(row.marks):
        content = shown(mark.value) if not mark.label else f"{mark.label} {shown(mark.value)}"
        marks.append(text(x, y, content, f"label halo {mark.class_}", "end"))
        x -= len(content) * CHARACTER + 18
    return marks
