"""The stage table: every benchmark after every stage in both modes, and reasoning RL on its validation set."""

from collections.abc import Sequence

from pensar.report.charts import responsive
from pensar.report.compare import NON_THINKING, THINKING
from pensar.report.contents import Report, StageScore, Validation
from pensar.report.html import Child, Markup, element
from pensar.report.intervals import ALONE, Mark, Row, interval_chart, pass_at_k
from pensar.report.numbers import (
    DASH,
    bare_percent,
    count,
    interval,
    listing,
    percent,
    plural,
    points,
    signed,
    words,
)
from pensar.report.sections.frame import figure, fold, lead, pending, scrolling, section, table

MODES = (THINKING, NON_THINKING)
NAMES = {"think_follow": "ThinkFollow"}
HEADER = "Scores after each stage"


def stage_table(report: Report) -> Markup:
    """Benchmarks down, stages across, thinking and non-thinking side by side."""
    rows = report.stage_table
    if not rows:
        return section(
            "stages", HEADER, pending("evaluate", "every benchmark after every stage in both modes")
        )
    stages = list(dict.fromkeys(row.after_stage for row in rows))
    parts: list[Child] = [lead(*_words(rows, stages)), figure(_grid(rows, stages))]
    parts.append(fold("By family of problems, and length of replies", _families(rows, stages)))
    if report.validation:
        parts += _validation(report.validation)
    return section("stages", HEADER, *parts)


def benchmark_name(benchmark: str) -> str:
    """As the page writes it."""
    return NAMES.get(benchmark, words(benchmark))


def _words(rows: Sequence[StageScore], stages: Sequence[str]) -> list[str | None]:
    moved = [row for row in rows if row.change]
    most = max(moved, key=lambda row: row.change or 0, default=None)
    sizes = sorted({row.n for row in rows})
    span = count(sizes[0]) if len(sizes) == 1 else f"{count(sizes[0])} to {count(sizes[-1])}"
    gain = None
    if most is not None and most.change is not None and most.change > 0:
        what = benchmark_name(most.benchmark) + (f", {most.mode}" if most.mode in MODES else "")
        gain = f"The largest step is {what}: {points(most.change)} points in {most.after_stage}."
    return [
        f"Percent of {span} held-out problems answered rightly, with 95% intervals, after {listing(stages)}.",
        "Signed figures are changes since the stage before in the same mode.",
        gain,
    ]


def _grid(rows: Sequence[StageScore], stages: Sequence[str]) -> Markup:
    cells = {(row.benchmark, row.after_stage, row.mode): row for row in rows}
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    top = [element("th", "", rowspan=2)]
    top += [element("th", stage, colspan=2, class_="stage", scope="colgroup") for stage in stages]
    modes = [element("th", mode, class_=f"{mode} mode", scope="col") for _ in stages for mode in MODES]
    body = []
    for benchmark in benchmarks:
        line = [element("th", benchmark_name(benchmark), scope="row")]
        for stage in stages:
            line += _pair(cells, benchmark, stage)
        body.append(element("tr", line))
    head = element("thead", element("tr", top), element("tr", modes))
    return scrolling(element("table", head, element("tbody", body), class_="stages"))


def _pair(cells: dict[tuple[str, str, str], StageScore], benchmark: str, stage: str) -> list[Markup]:
    """The two cells of a stage; one across both where the benchmark itself decides the mode."""
    if not any((benchmark, stage, mode) in cells for mode in MODES):
        other = next((row for key, row in cells.items() if key[:2] == (benchmark, stage)), None)
        return [element("td", _score(other), colspan=2, class_="both")]
    return [element("td", _score(cells.get((benchmark, stage, mode))), class_=mode) for mode in MODES]


def _score(row: StageScore | None) -> Child:
    if row is None:
        return element("span", DASH, class_="none")
    change = None
    if row.change is not None:
        tone = "up" if row.change > 0 else "down" if row.change < 0 else "even"
        change = element("span", signed(f"{row.change * 100:+.1f}"), class_=f"change {tone}")
    span = element("span", interval(row.low, row.high), class_="interval")
    return [element("b", bare_percent(row.score), title=plural(row.n, "problem")), change, span]


def _families(rows: Sequence[StageScore], stages: Sequence[str]) -> Markup:
    families = list(dict.fromkeys((row.benchmark, family) for row in rows for family in row.families))
    header = ["benchmark", "family"]
    columns = [(stage, mode) for stage in stages for mode in (*MODES, "flags") if _has(rows, stage, mode)]
    found = {(row.benchmark, row.after_stage, row.mode): row for row in rows}
    body: list[list[str]] = []
    for benchmark, family in families:
        line = [benchmark_name(benchmark), words(family)]
        for stage, mode in columns:
            row = found.get((benchmark, stage, mode))
            line.append(percent(row.families[family]) if row is not None and family in row.families else DASH)
        body.append(line)
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        line = [benchmark_name(benchmark), "tokens in a reply"]
        for stage, mode in columns:
            row = found.get((benchmark, stage, mode))
            line.append(f"{row.tokens:.1f}" if row is not None and row.tokens is not None else DASH)
        body.append(line)
    return table([*header, *(f"{stage}, {mode}" for stage, mode in columns)], body, text_columns=2)


def _has(rows: Sequence[StageScore], stage: str, mode: str) -> bool:
    return any(row.after_stage == stage and row.mode == mode for row in rows)


def _validation(rows: Sequence[Validation]) -> list[Child]:
    first, last = rows[0], rows[-1]
    said = [
        f"Each of {plural(last.n, 'validation problem')} answered once, thinking: accuracy with 95% intervals."
    ]
    if len(rows) > 1:
        said.append(
            f"{percent(first.score)} after {first.stage}, {percent(last.score)} after {last.stage}: "
            f"{points(last.score - first.score)} points."
        )
    if first.pass_at_k is not None and last.pass_at_k is not None and len(rows) > 1:
        said.append(
            f"pass@{last.k}, the chance that one of {count(last.k)} samples is right, goes from "
            f"{percent(first.pass_at_k)} to {percent(last.pass_at_k)}; the hollow dots."
        )
    lines = [_validation_row(row) for row in rows]
    chart = responsive(lambda width: interval_chart(lines, "Accuracy on validation", width=width), ALONE)
    return [element("h3", "Validation problems"), lead(*said), figure(chart)]


def _validation_row(row: Validation) -> Row:
    accuracy = Mark(row.score, row.low, row.high, THINKING, label="accuracy")
    return Row(f"after {row.stage}", (accuracy, *pass_at_k(row)))
