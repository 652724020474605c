"""The lab's charts: a line for each arm with the range over its seeds, in SVG files that stand alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pensar.report.charts import Frame, Scale, area, dot, line, log_ticks, text, ticks, trace, x_axis, y_axis
from pensar.report.html import Markup, element
from pensar.report.numbers import percent, short, significant

FOLDER = Path(__file__).parent.parent / "docs" / "lab"
WIDTH, HEIGHT = 440.0, 270.0
"""Of one panel."""
LEGEND = 24.0
COLOURS = ("#4a3fb5", "#b04a05", "#1c6e43", "#8a1f63", "#6f6b64")
STYLE = Markup(
    "<style>svg{background:#fdfcfa;font-family:system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif}"
    ".grid{stroke:#dedad2}.axis{stroke:#8a867e}.tick{font-size:11px;fill:#5d5a54}"
    ".label{font-size:12.5px;fill:#1d1c1a}.title{font-size:13.5px;font-weight:600;fill:#1d1c1a}"
    ".line{fill:none;stroke-width:2}"
    + "".join(
        f".line.s{number}{{stroke:{colour}}}.dot.s{number}{{fill:{colour}}}"
        f".area.s{number}{{fill:{colour};opacity:.15}}.range.s{number}{{stroke:{colour};stroke-width:2}}"
        for number, colour in enumerate(COLOURS)
    )
    + "</style>"
)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """One chart: label of a line -> its rows, in order of `at`."""

    title: str
    across: str
    series: dict[str, list[Row]]
    logarithmic: tuple[bool, bool] = (False, False)
    shown: Callable[[float], str] = significant
    names: tuple[str, ...] = ()
    """Of the places 0, 1, ... on the axis, where these are no numbers."""
    low: float | None = None
    high: float | None = None


def draw(name: str, rows: Sequence[Row]) -> Path:
    """Writes `docs/lab/NAME.svg` from the lines of an experiment."""
    panels = PANELS[name](rows)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    columns = min(2, len(panels))
    beside = 3 if columns > 1 else 1
    width, height = WIDTH * columns, LEGEND * -(-len(labels) // beside) + 14
    marks: list[Markup] = [STYLE]
    for number, label in enumerate(labels):
        x, y = 20 + number % beside * (width - 20) / min(beside, len(labels)), 18 + number // beside * LEGEND
        marks += [line(x, y, x + 22, y, f"line s{number}"), text(x + 28, y + 4, label)]
    for number, panel in enumerate(panels):
        left, top = number % columns * WIDTH, height + number // columns * HEIGHT
        marks.append(element("g", *_panel(panel, labels), transform=f"translate({left:g},{top:g})"))
    height += -(-len(panels) // columns) * HEIGHT
    picture = element(
        "svg",
        *marks,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="img",
        aria_label="; ".join(panel.title for panel in panels),
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.svg"
    path.write_text(picture + "\n")
    return path


def _panel(panel: Panel, labels: Sequence[str]) -> list[Markup]:
    rows = [row for series in panel.series.values() for row in series]
    low = min(row["low"] for row in rows) if panel.low is None else panel.low
    high = max(row["high"] for row in rows) if panel.high is None else panel.high
    log_x, log_y = panel.logarithmic
    places = sorted({row["at"] for row in rows})
    edge = 0.5 if panel.names else 0.0
    frame = Frame(
        Scale(places[0] - edge, places[-1] + edge, 54, WIDTH - 18, log_x),
        Scale(low, high, HEIGHT - 48, 30, log_y),
    )
    marks = [text(frame.left, 16, panel.title, "title")]
    marks += y_axis(frame, log_ticks(low, high) if log_y else ticks(low, high), panel.shown)
    if panel.names:
        marks += x_axis(frame, places, lambda place: panel.names[int(place)])
    elif len(places) <= 6:
        marks += x_axis(frame, places, short if places[-1] > 1_000 else significant)
    else:
        marks += x_axis(frame, ticks(places[0], places[-1], 4), short)
    marks.append(text((frame.left + frame.right) / 2, HEIGHT - 12, panel.across, "tick", "middle"))
    for label, series in panel.series.items():
        marks += _line(series, f"s{labels.index(label)}", frame, labels.index(label), panel)
    return marks


def _line(series: Sequence[Row], class_: str, frame: Frame, number: int, panel: Panel) -> list[Markup]:
    """The means, joined, over the surface of their ranges; beside each other with a bar each at named places."""
    if panel.names:
        marks = []
        for row in series:
            x, mean = frame.at((row["at"] + 0.14 * (number - 1), row["mean"]))
            marks.append(line(x, frame.y(row["low"]), x, frame.y(row["high"]), f"range {class_}"))
            marks.append(dot((x, mean), f"dot {class_}", panel.shown(row["mean"])))
        return marks
    upper = [frame.at((row["at"], row["high"])) for row in series]
    lower = [frame.at((row["at"], row["low"])) for row in series]
    marks = [area(upper, lower, f"area {class_}")]
    marks.append(trace([frame.at((row["at"], row["mean"])) for row in series], f"line {class_}"))
    if len(series) <= 8:
        marks += [dot(frame.at((row["at"], row["mean"])), f"dot {class_}", radius=3.0) for row in series]
    return marks


def _series(rows: Sequence[Row], metric: str, label: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["metric"] == metric:
            found.setdefault(label(row), []).append(row)
    return {name: sorted(series, key=lambda row: row["at"] or 0) for name, series in found.items()}


def _arm(row: Row) -> str:
    return str(row["arm"])


def _moe(rows: Sequence[Row]) -> list[Panel]:
    curves = {
        label: [row for row in series if row["at"] > 100_000]
        for label, series in _series(rows, "training_loss", _arm).items()
    }
    return [Panel("Training loss, nats per token", "tokens read", curves)]


def _qk_norm(rows: Sequence[Row]) -> list[Panel]:
    def norms(row: Row) -> str:
        return f"{row['arm'].split()[0]} norms on queries and keys"

    return [
        Panel(
            "Loss at the end, nats", "peak learning rate", _series(rows, "final_loss", norms), (True, False)
        ),
        Panel(
            "Largest score of attention",
            "peak learning rate",
            _series(rows, "largest_score", norms),
            (True, True),
        ),
    ]


def _mixture(rows: Sequence[Row]) -> list[Panel]:
    def placed(names: Sequence[str], kind: str) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for place, name in enumerate(names):
            for arm, series in _series(rows, f"{kind} {name}", _arm).items():
                found.setdefault(arm, []).append({**series[0], "at": place})
        return found

    families, texts = ("chain", "logic", "parity"), ("problems", "text and code")
    solved, held_out = placed(families, "solved"), placed(texts, "held_out")
    return [
        Panel(
            "Problems solved in writing", "family", solved, shown=percent, names=families, low=0.0, high=1.0
        ),
        Panel("Held-out bits per byte", "documents", held_out, names=texts),
    ]


def _long_context(rows: Sequence[Row]) -> list[Panel]:
    def reading(row: Row) -> str:
        way = row["metric"].partition(", ")[2]
        return way if row["arm"].startswith("with ") else f"no long-context stage, {way}"

    kept = [row for row in rows if row["arm"].startswith("with ") or row["metric"].endswith("as trained")]
    panels = []
    for kind in ("needle", "multi-needle", "variables", "bits_per_byte"):
        names = [f"{kind}, {way}" for way in ("as trained", "YaRN", "DCA", "DCA and YaRN's temperature")]
        series = {label: rest for name in names for label, rest in _series(kept, name, reading).items()}
        bits = kind == "bits_per_byte"
        title = "Bits per byte of the last quarter" if bits else f"Answered right: {kind}"
        limits = {} if bits else {"low": 0.0, "high": 1.0, "shown": percent}
        panels.append(Panel(title, "tokens of the text", series, (True, False), **limits))
    return panels


PANELS: Mapping[str, Callable[[Sequence[Row]], list[Panel]]] = {
    "moe": _moe,
    "qk-norm": _qk_norm,
    "mixture": _mixture,
    "long-context": _long_context,
}
