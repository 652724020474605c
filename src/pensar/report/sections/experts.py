"""How the experts of sparse models share the tokens: each layer's shares as a strip, and the balance over the steps."""

from collections.abc import Sequence

from pensar.report.charts import NARROW, picture, responsive, text, titled
from pensar.report.contents import ExpertShares, Report, Training
from pensar.report.curves import value_chart
from pensar.report.html import Child, Markup, element
from pensar.report.numbers import count, percent, plural, significant
from pensar.report.sections.frame import caption, figure, lead, section

OVERLOAD, ENTROPY, DEAD = "expert_overload", "expert_entropy", "dead_experts"
PANELS = {
    OVERLOAD: "overload of the fullest expert: its share over the even one, less 1",
    ENTROPY: "entropy of the shares over its maximum, mean of layers",
    DEAD: "experts without a token, all layers",
}
ROW = 26.0
FULL = 2.0
"""Times the even share from which a strip's colour is at its fullest."""
NUMBERED = 44.0
"""Pixels an expert's box needs to hold its number."""


def experts(report: Report) -> Markup | None:
    """Shares of the last steps and balance over all; None where no stage trained a mixture of experts."""
    if not report.experts:
        return None
    trainings = {training.stage: training for training in report.training}
    parts: list[Child] = [lead(*_words(report.experts))]
    for own in report.experts:
        parts.append(_stage(own, trainings.get(own.stage)))
    return section("experts", "Use of the experts", *parts)


def _words(shares: Sequence[ExpertShares]) -> list[str]:
    last = shares[-1]
    most = max(share for layer in last.shares for share in layer)
    num = len(last.shares[0])
    even = f"Even shares are {percent(1 / num)}; the fullest expert after {last.stage} has {percent(most)},"
    return [
        f"Each layer's {plural(num, 'expert')} and what share of the layer's assignments each had in the last tenth",
        "of a stage's steps.",
        f"{even} {significant(most * num)} times that.",
        "A box is the darker the more it has.",
    ]


def _stage(own: ExpertShares, training: Training | None) -> Markup:
    first, after = own.steps
    chart = responsive(lambda width: shares_chart(own, width))
    title = caption(f"shares of assignments, steps {count(first)} to {count(after - 1)}")
    parts: list[Child] = [element("h4", own.stage), title, chart]
    if training is not None:
        panels = [
            element("div", caption(words), value_chart(training, name, width=300), class_="panel")
            for name, words in PANELS.items()
            if name in training.series
        ]
        if panels:
            parts.append(element("div", panels, class_="panels thirds"))
    return figure(*parts)


def shares_chart(own: ExpertShares, width: float) -> Markup:
    """A row a layer, a box an expert: the opacity is the share over the even one, full from twice on."""
    left = 56.0
    num = len(own.shares[0])
    size = (width - left - 4) / num
    marks: list[Markup] = []
    for layer, row in enumerate(own.shares):
        y = 4 + layer * ROW
        marks.append(text(0, y + ROW / 2 + 3, f"layer {layer}", "tick"))
        for expert, share in enumerate(row):
            x, times = left + expert * size, share * num
            title = (
                f"layer {layer}, expert {expert}: {percent(share)}, {significant(times)} times the even share"
            )
            marks.append(_box(x, y, size, min(times / FULL, 1.0), title))
            if size >= NUMBERED and width > NARROW:
                label = text(x + size / 2, y + ROW / 2 + 3, percent(share), "label halo", "middle")
                marks.append(label)
    return picture(width, 8 + ROW * len(own.shares), f"Use of experts in {own.stage}", marks)


def _box(x: float, y: float, size: float, opacity: float, title: str) -> Markup:
    gap = 2.0 if size > 8 else 0.5
    return element(
        "rect",
        titled(title),
        x=x,
        y=y,
        width=size - gap,
        height=ROW - 4,
        class_="share" if opacity > 0 else "share none",
        fill_opacity=round(0.06 + 0.94 * opacity, 3),
    )
