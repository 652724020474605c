"""What each stage cost: time, tokens a second, memory."""

from pensar.report.contents import Headline, Report, StageRow
from pensar.report.html import Markup, element
from pensar.report.numbers import DASH, count, duration, listing, percent, plural, short, size
from pensar.report.sections.frame import bar, figure, lead, nothing_yet, scrolling, section

TITLE = "Time and memory"
LONGEST = 3
"""Stages that the lead names."""


def costs(report: Report) -> Markup:
    """Every stage with bars for its time and memory."""
    if not report.stages:
        return section("costs", TITLE, nothing_yet())
    trained = {training.stage for training in report.training}
    said = lead(*_words(report.stages, report.headline))
    return section("costs", TITLE, said, figure(_table(report.stages, trained)))


def _words(stages: list[StageRow], head: Headline) -> list[str | None]:
    longest = sorted(stages, key=lambda row: -row.seconds)[:LONGEST]
    share = sum(row.seconds for row in longest) / head.seconds if head.seconds else 0
    names = listing([row.name for row in longest])
    resumed = [row.name for row in stages if row.resumed]
    processes = plural(head.ranks, "process", "processes")
    return [
        f"All stages took {duration(head.seconds)}, {duration(head.cpu_seconds)} of processor time on {processes};",
        f"{names} took {percent(share, 0)} of it.",
        f"Memory is the sum of each process's highest: {size(head.peak_memory_bytes)} at the most.",
        "Tokens per second count whole training steps, the drawing of replies included."
        if head.tokens_trained
        else None,
        f"Of {listing(resumed)}, which an interruption cut, the time is that of the last attempt."
        if resumed
        else None,
    ]


def _table(stages: list[StageRow], trained: set[str]) -> Markup:
    longest = max(row.seconds for row in stages) or 1.0
    largest = max(row.peak_memory_bytes for row in stages) or 1
    fastest = max((row.tokens_per_second or 0 for row in stages if row.name in trained), default=0) or 1.0
    body = []
    for row in stages:
        speed = row.tokens_per_second
        cells = [
            element("td", row.name, class_="text"),
            *_barred(duration(row.seconds), row.seconds / longest),
            element(
                "td",
                DASH if row.tokens is None else short(row.tokens),
                title=_exact(row.tokens),
                class_="number",
            ),
            *_barred(
                DASH if speed is None else short(speed), (speed or 0) / fastest if row.name in trained else 0
            ),
            *_barred(size(row.peak_memory_bytes), row.peak_memory_bytes / largest),
        ]
        body.append(element("tr", cells))
    head = [element("th", "stage", scope="col", class_="text")]
    for title, with_bar in (("time", True), ("tokens", False), ("tokens/s", True), ("memory", True)):
        head.append(element("th", title, scope="col", class_="number"))
        if with_bar:
            head.append(element("td", class_="barred"))
    rows = element("thead", element("tr", head)), element("tbody", body)
    return scrolling(element("table", *rows, class_="costs"))


def _barred(content: str, share: float) -> list[Markup]:
    """A number and, in a cell of its own, its bar."""
    return [
        element("td", content, class_="number"),
        element("td", bar(share) if share else None, class_="barred"),
    ]


def _exact(tokens: int | None) -> str | None:
    return None if tokens is None else count(tokens)
