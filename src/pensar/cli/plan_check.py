"""`pensar plan SIZE --simulate`: the plan's formulas beside a simulated step of the same layout."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from pensar.base.config import complete
from pensar.base.errors import ConfigError
from pensar.cli.screen import Screen
from pensar.report.numbers import count, percent, plural, size

if TYPE_CHECKING:
    from pensar.model.config import ModelConfig
    from pensar.train.comparison import Comparison, Row
    from pensar.train.footprint import Step
    from pensar.train.layout import Layout
    from pensar.train.planner import Candidate, Cluster


def chosen(
    model: "ModelConfig", cluster: "Cluster", found: "Sequence[Candidate]", text: str | None
) -> "tuple[Layout, Step]":
    """The plan's best layout, or the one of `text`, as the plan would use it or with one row a pass."""
    from pensar.train.footprint import Step
    from pensar.train.layout import parse_layout

    if text is None:
        return found[0].layout, found[0].step
    for one in found:
        if text == str(one.layout):
            return one.layout, one.step
    layout = parse_layout(text)
    if layout.ranks != cluster.gpus:
        raise ConfigError(f"layout {text} is of {layout.ranks} ranks; the plan is for --gpus {cluster.gpus}")
    layout.check(model, cluster.context, cluster.rows)
    layout.check_recompute(model, layout.recompute)
    passes = 1 if layout.pp > 1 else -(-cluster.rows // layout.data)
    step = Step(
        context=cluster.context,
        accumulate=passes,
        chunk_tokens=cluster.chunk_tokens,
        muon=cluster.muon,
        exact_balance=cluster.exact_balance,
    )
    return layout, step


def check(
    screen: Screen, model: "ModelConfig", cluster: "Cluster", layout: "Layout", step: "Step"
) -> list[dict[str, Any]]:
    """Simulates both ends of the depth where it is split, prints the comparisons, and gives them as documents."""
    from pensar.train.comparison import compare

    documents = []
    for stage in sorted({0, layout.pp - 1}):
        found = compare(model, layout, step, cluster.accelerator, stage)
        _show(screen, found)
        documents.append(_document(found))
    return documents


def _show(screen: Screen, found: "Comparison") -> None:
    part = f", part {found.stage + 1} of {found.layout.pp} of the depth" if found.layout.pp > 1 else ""
    rows = plural(found.step.rows, "row")
    passes = plural(found.layout.micro_batches * found.step.accumulate, "pass", "passes")
    depths = found.simulated.depths
    drawn = "all layers run"
    if len(depths) > 1:
        runs = ", ".join(str(depth) for depth in depths)
        drawn = (
            f"{runs} layers run, the rest on their line; the last is {percent(found.simulated.bend)} off it"
        )
    screen.line(
        f"simulated    {str(found.layout) or 'one rank'}{part}: {rows} a pass, {passes}, code of a CPU"
    )
    screen.line(f"             {drawn}")
    _table(screen, "memory of a GPU", [*found.moments, found.peak])
    screen.line()
    _table(screen, f"at its most ({found.simulated.moment})", found.parts)
    screen.line()
    if found.exchanges:
        _table(screen, "exchanges of a GPU in these passes", found.exchanges)
        screen.line()
        calls = [
            (one.kind, one.dimension, str(one.ranks), count(one.calls), size(one.num_bytes))
            for one in found.simulated.exchanges
        ]
        screen.table(("collective", "over", "ranks", "calls", "bytes"), calls, (2, 3, 4))
        screen.line()


def _table(screen: Screen, title: str, rows: "Sequence[Row]") -> None:
    shown = [
        (row.name, size(row.predicted), size(row.simulated), _signed(row.difference))
        for row in rows
        if row.predicted or row.simulated
    ]
    screen.table((title, "predicted", "simulated", "difference"), shown, (1, 2, 3))


def _signed(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f}%"


def _document(found: "Comparison") -> dict[str, Any]:
    def rows(several: "Sequence[Row]") -> list[dict[str, Any]]:
        return [row._asdict() | {"difference": row.difference} for row in several]

    return {
        "layout": complete(found.layout),
        "step": complete(found.step),
        "stage": found.stage,
        "peak_bytes": found.peak._asdict() | {"difference": found.peak.difference},
        "moments": rows(found.moments),
        "parts": rows(found.parts),
        "exchanges": rows(found.exchanges),
        "collectives": [one._asdict() for one in found.simulated.exchanges],
        "simulated_moments": msgspec.to_builtins(found.simulated.moments),
        "depths": list(found.simulated.depths),
        "bend": found.simulated.bend,
    }
