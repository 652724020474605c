"""Comparison: what the planner's formulas say of a step, beside what a simulation of the same step finds.

The simulation runs the code of a CPU, where the loss is written over its logits, so the formulas are asked about that.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from pensar.model.config import ModelConfig
from pensar.train.accelerators import Accelerator
from pensar.train.footprint import PARTS, Step, moments
from pensar.train.layout import Layout
from pensar.train.recorder import Exchange
from pensar.train.simulate import Simulated, simulate
from pensar.train.traffic import traffic

MOST_PASSES = 2
"""Forward passes that are simulated where a step has more: the second adds to gradients, all others are like it."""
WEIGHTS = ("shard", "expert shard", "stage", "data")
"""Names of the ranks that share weights; where two kinds are the same ranks, the group has the name of one."""


class Row(NamedTuple):
    """One quantity of a rank, in bytes."""

    name: str
    predicted: float
    simulated: float

    @property
    def difference(self) -> float | None:
        """Of the prediction, as a share of what the simulation found; None where that is nothing."""
        return self.predicted / self.simulated - 1 if self.simulated else None


class Comparison(NamedTuple):
    """The predictions of one rank's step, each beside what was found."""

    layout: Layout
    step: Step
    """What was simulated: that of the plan, with fewer passes and micro-batches where it has many."""
    stage: int
    moments: list[Row]
    """Memory at each moment of the step, all parts together."""
    parts: list[Row]
    """Memory of each part at the moment that needs most."""
    exchanges: list[Row]
    """Bytes of one step."""
    simulated: Simulated

    @property
    def peak(self) -> Row:
        most = max(self.moments, key=lambda row: row.simulated)
        return Row("peak", max(row.predicted for row in self.moments), most.simulated)


def compare(model: ModelConfig, layout: Layout, step: Step, gpu: Accelerator, stage: int = 0) -> Comparison:
    """Simulates a step of the first rank in part `stage` of the depth."""
    layout, step = shortened(layout, step)
    found = simulate(model, layout, step, stage)
    said = moments(model, layout, step, stage)
    totals = [
        Row(name, sum(parts.values()), sum(found.moments.get(name, {}).values()))
        for name, parts in said.items()
    ]
    worst = found.moment if found.moment in said else max(said, key=lambda name: sum(said[name].values()))
    names = [name for name in PARTS if said[worst].get(name) or found.moments[worst].get(name)]
    parts = [Row(name, said[worst].get(name, 0.0), found.moments[worst].get(name, 0.0)) for name in names]
    return Comparison(
        layout, step, stage, totals, parts, _exchanges(model, layout, step, gpu, stage, found), found
    )


def shortened(layout: Layout, step: Step) -> tuple[Layout, Step]:
    """The same with as few passes as behave like many: in a pipeline, one more or a round more than fill it."""
    if layout.pp > 1:
        enough = layout.pp + (layout.pp if layout.virtual > 1 else 1)
        layout = msgspec.structs.replace(layout, micro_batches=min(layout.micro_batches, enough))
    layout = msgspec.structs.replace(layout, accumulate=1)
    passes = min(step.accumulate, MOST_PASSES)
    return layout, msgspec.structs.replace(step, accumulate=passes, on_cpu=True)


def _exchanges(
    model: ModelConfig, layout: Layout, step: Step, gpu: Accelerator, stage: int, found: Simulated
) -> list[Row]:
    passes = layout.micro_batches * step.accumulate
    left = list(found.exchanges)
    rows = []
    for one in traffic(model, layout, step, gpu, stage):
        mine = [exchange for exchange in left if KINDS[one.name](exchange)]
        left = [exchange for exchange in left if exchange not in mine]
        times = 1 if one.kind == "step" else passes
        rows.append(Row(one.name, times * one.num_bytes, sum(exchange.num_bytes for exchange in mine)))
    rest = sum(exchange.num_bytes for exchange in left)
    return [*rows, Row("counts, norms and sums of the loss", 0.0, rest)] if rest else rows


KINDS: dict[str, Callable[[Exchange], bool]] = {
    "all-gather of weights": lambda one: one.kind == "all-gather" and one.dimension in WEIGHTS,
    "reduce-scatter of gradients": lambda one: one.kind == "reduce-scatter" and one.dimension in WEIGHTS,
    "all-reduce over replicas": lambda one: one.kind == "all-reduce" and one.dimension == "replicate",
    "all-to-all of tokens": lambda one: one.kind == "all-to-all" and one.dimension in ("ep", "tp"),
    "all-gather of keys and values": lambda one: one.dimension == "cp",
    "gathers and scatters of the stream": lambda one: one.dimension == "tp",
    "stream between parts of the depth": lambda one: one.kind in ("send", "receive"),
    "matrices for Muon": lambda one: one.kind == "all-to-all",
}
"""Which collectives each name of `traffic` is about."""
