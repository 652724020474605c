"""What each stage cost: time, tokens a second, memory."""

from pensar.report.contents import Headline, Report, StageRow
from pensar.report.html import Child, Markup, element
from pensar.report.numbers import DASH, count, duration, listing, percent, plural, short, size
from pensar.report.sections.frame import bar, figure, lead, scrolling, section

TITLE = "Time and memory"
LONGEST = 3
"""Stages that the lead names."""


def costs(report: Report) -> Markup:
    """Every stage with bars for its time and memory."""
    if not report.stages:
        return section("costs", TITLE, element("p", "Not yet: no stage has finished.", class_="pending"))
    return section(
        "costs", TITLE, lead(*_words(report.stages, report.headline)), figure(_table(report.stages))
    )


def _words(stages: list[StageRow], head: Headline) -> list[str | None]:
    longest = sorted(stages, key=lambda row: -row.seconds)[:LONGEST]
    share = sum(row.seconds for row in longest) / head.seconds if head.seconds else 0
    resumed = [row.name for row in stages if row.resumed]
    outdated = [row.name for row in stages if row.outdated]
    return [
        f"All stages together took {duration(head.seconds)}, {duration(head.cpu_seconds)} of processor time on "
        f"{plural(head.ranks, 'process', 'processes')}; {listing([row.name for row in longest])} took {percent(share, 0)} of it.",
        f"Memory is the sum of each process's highest: {size(head.peak_memory_bytes)} at the most.",
        "Tokens per second count the steps of training, rollouts included." if head.tokens_trained else None,
        f"Of {listing(resumed)}, which a crash interrupted, the time is that of the last attempt."
        if resumed
        else None,
        f"Made from an earlier artifact than the one shown: {listing(outdated)}." if outdated else None,
    ]


def _table(stages: list[StageRow]) -> Markup:
    longest = max(row.seconds for row in stages) or 1.0
    largest = max(row.peak_memory_bytes for row in stages) or 1
    fastest = max((row.tokens_per_second or 0 for row in stages), default=0) or 1.0
    header = ["stage", "time", "tokens", "tokens/s", "memory"]
    body = []
    for row in stages:
        speed = row.tokens_per_second
        cells: list[Child] = [
            element("td", row.name, class_="text"),
            _barred(duration(row.seconds), row.seconds / longest),
            element(
                "td",
                DASH if row.tokens is None else short(row.tokens),
                title=_exact(row.tokens),
                class_="number",
            ),
            _barred(DASH if speed is None else short(speed), (speed or 0) / fastest),
            _barred(size(row.peak_memory_bytes), row.peak_memory_bytes / largest),
        ]
        body.append(element("tr", cells))
    head = element(
        "tr",
        [element("th", cell, scope="col", class_="text" if cell == "stage" else "number") for cell in header],
    )
    return scrolling(element("table", element("thead", head), element("tbody", body), class_="costs"))


def _barred(content: str, share: float) -> Markup:
    return element("td", element("span", content), bar(share), class_="number barred")


def _exact(tokens: int | None) -> str | None:
    return None if tokens is None else count(tokens)
