"""Loss by groups of documents: the record that pre-training keeps of it, thinned, and its chart."""

from collections.abc import Sequence
from typing import Any

from pensar.report.charts import CHARACTER, Frame, Scale, picture, spread, text, ticks, trace, x_axis, y_axis
from pensar.report.contents import GroupLoss
from pensar.report.html import Markup
from pensar.report.numbers import short, significant

MOST_POINTS = 40
MOST_LINES = 8
"""Lines of one chart, those of the most tokens."""
LINE_HEIGHT = 14.0
LABEL = 18
"""Characters of a group's name in a chart."""


def group_losses(rows: Sequence[dict[str, Any]]) -> dict[str, list[GroupLoss]]:
    """Mark -> its groups, those of the most tokens first; `rows` are those of losses.jsonl."""
    marks = dict.fromkeys(name for row in rows for name in row if name not in ("step", "steps"))
    return {mark: _groups(rows, mark) for mark in marks}


def _groups(rows: Sequence[dict[str, Any]], mark: str) -> list[GroupLoss]:
    labels = dict.fromkeys(label for row in rows for label in row.get(mark, {}))
    groups = []
    for label in labels:
        entries = [
            (float(row["step"]), entry["loss"], entry["tokens"])
            for row in rows
            if (entry := row.get(mark, {}).get(label)) is not None
        ]
        edge = max(1, len(entries) // 10)
        groups.append(
            GroupLoss(
                label=label,
                tokens=int(sum(tokens for *_, tokens in entries)),
                first=_mean(entries[:edge]),
                last=_mean(entries[-edge:]),
                points=_thinned(entries),
            )
        )
    return sorted(groups, key=lambda group: (-group.tokens, group.label))


def _thinned(entries: list[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """At most so many points: of equal stretches of rows the last step and the mean over their tokens."""
    size = -(-len(entries) // MOST_POINTS)
    parts = [entries[start : start + size] for start in range(0, len(entries), size)]
    return [(part[-1][0], _mean(part)) for part in parts]


def _mean(entries: list[tuple[float, float, float]]) -> float:
    """Weighted by tokens, in six digits."""
    tokens = sum(entry[2] for entry in entries)
    return float(f"{sum(loss * weight for _, loss, weight in entries) / tokens:.6g}")


def group_chart(stage: str, mark: str, groups: Sequence[GroupLoss], width: float = 440) -> Markup:
    """The largest groups' losses over the steps, each with its name and last value at the line's end."""
    shown = groups[:MOST_LINES]
    labels = [f"{_short(group.label)} {significant(group.last)}" for group in shown]
    bottom = max(206.0, 12 + LINE_HEIGHT * (len(shown) + 1))
    right = width - max(len(label) for label in labels) * CHARACTER - 16
    steps = [step for group in shown for step, _ in group.points]
    values = [loss for group in shown for _, loss in group.points]
    frame = Frame(Scale(min(steps), max(steps), 38, right), Scale(0.0, max(values) * 1.05 or 1.0, bottom, 12))
    marks = y_axis(frame, ticks(0.0, frame.y.high, 4), significant)
    marks += x_axis(frame, ticks(frame.x.low, frame.x.high, max(2, round((right - 38) / 60))), short)
    marks.append(text(frame.right, frame.bottom + 30, "step", "tick", "end"))
    ends = [frame.y(group.points[-1][1]) for group in shown]
    places = spread(ends, LINE_HEIGHT, frame.top + 4, frame.bottom)
    for group, label, place in zip(shown, labels, places, strict=True):
        marks.append(
            trace([frame.at(point) for point in group.points], "line thin", f"{group.label} {label}")
        )
        marks.append(text(right + 6, place + 4, label, "label"))
    return picture(width, bottom + 34, f"Loss by {mark} over the steps of {stage}", marks)


def _short(label: str) -> str:
    return label if len(label) <= LABEL else label[: LABEL - 1] + "…"
