"""Thinking budgets told from the question against one budget for all: accuracy for what was thought."""

from collections.abc import Sequence
from itertools import pairwise

from pensar.report.charts import (
    NARROW,
    Frame,
    Point,
    Scale,
    area,
    dot,
    picture,
    responsive,
    spread,
    text,
    ticks,
    trace,
    x_axis,
    y_axis,
)
from pensar.report.contents import LearnedBudgets, Report, WayPoint
from pensar.report.html import Markup, element
from pensar.report.numbers import (
    DASH,
    bare_percent,
    interval,
    percent,
    plural,
    points,
    significant,
)
from pensar.report.sections.frame import figure, lead, section, table

FIXED, LEARNED, UNLIMITED = "fixed", "learned", "unlimited"
LINES = {LEARNED: ("thinking", "learned"), FIXED: ("strong", "one for all")}
"""Way -> the class that colours it, and its name."""


def learned_budgets(report: Report) -> Markup | None:
    """Both ways on held-out questions; None where no stage learned budgets."""
    own = report.learned_budgets
    if own is None:
        return None
    chart = responsive(lambda width: ways_chart(own, width))
    said = lead(*_words(own))
    return section("learned-budgets", "Learned thinking budgets", said, figure(chart), figure(_ways(own)))


def lines_of(own: LearnedBudgets) -> dict[str, list[WayPoint]]:
    """The points of each way by tokens thought; without limit is where both end, the share being all."""
    return {
        way: sorted(
            (point for point in own.points if point.way in (way, UNLIMITED)),
            key=lambda point: (point.reasoning_tokens, point.share),
        )
        for way in LINES
    }


def gain(own: LearnedBudgets) -> float | None:
    """By how much learned budgets are right more often than one for all that lets think as much; mean of the points.

    One for all is read off the straight lines between its points. None where no learned point lies between two.
    """
    fixed = lines_of(own)[FIXED]
    gains = []
    for point in own.points:
        if point.way == LEARNED and (peer := _between(fixed, point.reasoning_tokens)) is not None:
            gains.append(point.accuracy - peer)
    return sum(gains) / len(gains) if gains else None


def ways_chart(own: LearnedBudgets, width: float) -> Markup:
    """Accuracy against tokens thought, a line and its intervals for each way."""
    narrow = width <= NARROW
    height = 320.0 if narrow else 360.0
    thought = [point.reasoning_tokens for point in own.points]
    room = (max(thought) - min(thought)) * 0.06 or 1.0
    across = Scale(max(0.0, min(thought) - room), max(thought) + room, 50, width - (22 if narrow else 130))
    least = min((point.low for point in own.points), default=0.0)
    frame = Frame(across, Scale(0.0 if least < 0.5 else 0.5, 1, height - 44, 24))
    marks = y_axis(frame, ticks(frame.y.low, 1, 5), percent)
    marks += x_axis(frame, ticks(across.low, across.high, 4 if narrow else 8), significant)
    middle = (frame.left + frame.right) / 2
    marks.append(text(middle, height - 8, "tokens of thinking a question, mean", "tick", "middle"))
    lines = lines_of(own)
    for way, line in lines.items():
        upper = [frame.at((point.reasoning_tokens, point.high)) for point in line]
        lower = [frame.at((point.reasoning_tokens, point.low)) for point in line]
        if len(line) > 1:
            marks.append(area(upper, lower, f"area {LINES[way][0]}"))
    for way, line in lines.items():
        colour, name = LINES[way]
        marks.append(trace([_at(point, frame) for point in line], f"line {colour}"))
        marks += [dot(_at(point, frame), f"dot {colour}", _title(point, name)) for point in line]
    return picture(
        width, height, "Accuracy against tokens of thinking", marks, _names(lines, frame, narrow=narrow)
    )


def _at(point: WayPoint, frame: Frame) -> Point:
    return frame.at((point.reasoning_tokens, point.accuracy))


def _title(point: WayPoint, name: str) -> str:
    thought = significant(point.reasoning_tokens)
    said = f"{percent(point.accuracy)} ({interval(point.low, point.high)}), {thought} tokens"
    if point.budget is None:
        return f"without limit: {said}"
    return f"{name}, to suffice for {percent(point.share)}: {said}"


def _names(lines: dict[str, list[WayPoint]], frame: Frame, *, narrow: bool) -> list[Markup]:
    """The ways' names: at the right of where the lines end; on a phone, in the corner that good curves leave free."""
    if narrow:
        rows = enumerate(LINES.values())
        return [
            text(frame.right, frame.bottom - 10 - 18 * row, name, f"label {colour} halo", "end")
            for row, (colour, name) in rows
        ]
    ends = {way: line[-1] for way, line in lines.items() if line}
    places = spread([frame.y(end.accuracy) for end in ends.values()], 18, frame.top + 4, frame.bottom)
    return [
        text(frame.right + 10, place + 4, LINES[way][1], f"label {LINES[way][0]}")
        for way, place in zip(ends, places, strict=True)
    ]


def _words(own: LearnedBudgets) -> list[str | None]:
    asked = plural(max(point.questions for point in own.points), "held-out question")
    said: list[str | None] = [
        f"{asked}, each with a budget told from its prompt, or all with the same one,",
        "at equal shares of questions that the budgets are to suffice for.",
    ]
    difference = gain(own)
    if difference is None:
        return [*said, "No learned point lies between two of the others; the surfaces are the 95% intervals."]
    learned = [point for point in own.points if point.way == LEARNED]
    half = sum(point.high - point.low for point in learned) / len(learned) / 2
    side = "more" if difference > 0 else "less"
    apart = points(abs(difference)).lstrip("+")
    much = "as often" if apart == "0.0" else f"{apart} points {side} often"
    sure = "within" if abs(difference) < half else "beyond"
    return [
        *said,
        f"At equal thinking learned budgets are right {much}, mean of their points:",
        f"{sure} the 95% intervals, which are the surfaces.",
    ]


def _ways(own: LearnedBudgets) -> Markup:
    """Every point in figures."""
    header = ["budget", "to suffice for", "mean budget", "tokens thought", "right", "sufficed for"]
    return table(header, [_way(point) for point in own.points])


def _way(point: WayPoint) -> list[str | Markup]:
    right = element(
        "span",
        element("b", bare_percent(point.accuracy)),
        element("span", interval(point.low, point.high), class_="interval"),
    )
    return [
        "none" if point.budget is None else LINES[point.way][1],
        DASH if point.budget is None else percent(point.share),
        DASH if point.budget is None else significant(point.budget),
        significant(point.reasoning_tokens),
        right,
        percent(point.sufficed),
    ]


def _between(line: Sequence[WayPoint], thought: float) -> float | None:
    """The accuracy at so many tokens on the straight lines between the points; None beyond them."""
    for one, other in pairwise(line):
        if one.reasoning_tokens <= thought <= other.reasoning_tokens:
            span = other.reasoning_tokens - one.reasoning_tokens
            part = (thought - one.reasoning_tokens) / span if span else 0.5
            return one.accuracy + part * (other.accuracy - one.accuracy)
    return None
