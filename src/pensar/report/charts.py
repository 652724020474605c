"""Drawing in SVG: scales, axes, lines and labels. Colours and type are the style sheet's; here are only classes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pensar.report.html import Child, Markup, element

WIDE, NARROW = 920, 380
"""Widths for which a chart is drawn: for a desk and for a phone."""
CHARACTER = 7.0
"""Width of an average character of a label, in pixels, in a wide system font."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Values to pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class Frame:
    """The rectangle between the axes."""

    x: Scale
    y: Scale

    @property
    def left(self) -> float:
        return self.x.start

    @property
    def right(self) -> float:
        return self.x.end

    @property
    def top(self) -> float:
        return self.y.end

    @property
    def bottom(self) -> float:
        return self.y.start

    def at(self, point: Point) -> Point:
        """A pair of values as pixels."""
        return self.x(point[0]), self.y(point[1])


def picture(width: float, height: float, label: str, *children: Child, class_: str = "chart") -> Markup:
    """An SVG picture that fills the width of its box; `label` is what it says to who cannot see it."""
    box = f"0 0 {width:g} {height:g}"
    # A chart never grows much beyond the size it was drawn for: its letters would outgrow the text.
    style = f"max-width:{width * 1.15:.0f}px"
    return element("svg", *children, class_=class_, viewBox=box, style=style, role="img", aria_label=label)


def responsive(draw: Callable[[float], Markup], wide: float = WIDE) -> Markup:
    """One chart drawn for a desk and for a phone; the style sheet shows the one that fits."""
    return element(
        "div",
        element("div", draw(wide), class_="wide"),
        element("div", draw(NARROW), class_="narrow"),
        class_="responsive",
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values from `low` to `high`, at most about `most`."""
    if high <= low:
        return [low]
    rough = (high - low) / max(most, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from `low` to `high`; only the powers where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    return [
        factor * 10.0**power
        for power in powers
        for factor in factors
        if low <= factor * 10.0**power <= high * 1.0001
    ]


def text(
    x: float, y: float, content: str, class_: str = "label", anchor: str | None = None, **more: str
) -> Markup:
    """A label; `anchor` is middle or end."""
    return element("text", content, x=x, y=y, class_=class_, text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def trace(points: Sequence[Point], class_: str, title: str | None = None) -> Markup:
    """A line through points in pixels; a single point becomes a dot."""
    if len(points) == 1:
        return dot(points[0], class_.replace("line", "dot"), title, radius=2.5)
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return element("path", titled(title), d=d, class_=class_)


def area(upper: Sequence[Point], lower: Sequence[Point], class_: str) -> Markup:
    """The surface between two lines."""
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in [*upper, *reversed(lower)]) + "Z"
    return element("path", d=d, class_=class_)


def dot(point: Point, class_: str, title: str | None = None, radius: float = 4.0) -> Markup:
    """A round mark."""
    return element("circle", titled(title), cx=point[0], cy=point[1], r=radius, class_=class_)


def titled(title: str | None) -> Markup | None:
    """What a browser shows when the pointer rests on a mark."""
    return element("title", title) if title else None


def y_axis(frame: Frame, values: Sequence[float], shown: Callable[[float], str]) -> list[Markup]:
    """Horizontal grid lines with their values."""
    marks = []
    for value in values:
        y = frame.y(value)
        marks.append(line(frame.left, y, frame.right, y, "grid"))
        marks.append(text(frame.left - 6, y + 4, shown(value), "tick", "end"))
    return marks


def x_axis(frame: Frame, values: Sequence[float], shown: Callable[[float], str]) -> list[Markup]:
    """Values below the frame, and its lower edge."""
    marks = [line(frame.left, frame.bottom, frame.right, frame.bottom, "axis")]
    for value in values:
        marks.append(text(frame.x(value), frame.bottom + 17, shown(value), "tick", "middle"))
    return marks


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as needed so that neighbours keep `gap`, in the order given, within low..high."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    at = low
    for index in order:
        moved[index] = at = max(moved[index], at)
        at += gap
    at = high
    for index in reversed(order):
        moved[index] = at = min(moved[index], at)
        at -= gap
    return moved
