"""The records of training stages: rows of metrics and timings, thinned to what a chart can show."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pensar.base.errors import DataError
from pensar.report.contents import Training
from pensar.report.groups import group_losses

MAX_POINTS = 120
"""Points of one drawn line; more would be finer than the picture."""
EDGE = 10
"""The first and last values are means over such a part of the steps, since single steps are noisy."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What a stage wrote down of its steps."""

    rows: list[Row]
    timings: list[Row]
    losses: list[Row] = field(default_factory=list)
    """Of groups of documents, at an interval."""

    def tokens(self) -> int:
        """Tokens of all steps together."""
        return int(sum(row.get("tokens", 0) for row in self.rows))

    def seconds(self) -> float:
        """Time of all steps together, over every attempt."""
        return float(sum(row.get("seconds", 0) for row in self.timings))


def read_record(artifact: Path, logs: Path) -> Record:
    """The metrics of an artifact and the timings in its log folder; empty where a stage writes none."""
    return Record(
        _rows(artifact / "metrics.jsonl"), _rows(logs / "timings.jsonl"), _rows(artifact / "losses.jsonl")
    )


def training(stage: str, record: Record, finished: bool = True) -> Training:
    """The stage's values over its steps, thinned."""
    names = dict.fromkeys(name for row in record.rows for name in row if name != "step")
    series = {}
    for name in names:
        points = [
            (float(row["step"]), float(row[name]))
            for row in record.rows
            if name in row and math.isfinite(row[name])
        ]
        if points:
            series[name] = points
    return Training(
        stage=stage,
        steps=len(record.rows),
        tokens=record.tokens(),
        finished=finished,
        first={name: _mean(points[: _edge(points)]) for name, points in series.items()},
        last={name: _mean(points[-_edge(points) :]) for name, points in series.items()},
        series={name: thinned(points) for name, points in series.items()},
        groups=group_losses(record.losses),
    )


def thinned(points: list[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: the means of equal stretches of neighbours."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(round(sum(x for x, _ in group) / len(group), 2), _mean(group)) for group in groups]


def _edge(points: list[tuple[float, float]]) -> int:
    return max(1, len(points) // EDGE)


def _mean(points: list[tuple[float, float]]) -> float:
    return float(f"{sum(y for _, y in points) / len(points):.6g}")


def _rows(path: Path) -> list[Row]:
    """The whole lines of a file that may still be growing; DataError for a whole line that is no row."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            rows.append(msgspec.json.decode(line, type=Row))
        except msgspec.DecodeError as error:
            raise DataError(
                f"{path}:{number}: not a row of a record ({error}); mend or remove the line"
            ) from None
    return rows
