"""Observer: what a stage writes down of its steps beyond their metrics: loss by groups of documents, layers, speed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pensar.base.metrics import LAYERS, LOSSES, Metrics
from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.groups import GroupLosses, Groups
from pensar.train.layers import Layers
from pensar.train.loss import Inputs, Totals
from pensar.train.speed import Speed, step_flops
from pensar.train.step import Spread

if TYPE_CHECKING:
    from pensar.train.parallel.mesh import Mesh

ROWS = 100
"""Rows of losses that a stage writes where no interval is asked for."""


class Observer:
    """The witness of a stage's steps; its state is that of the checkpoint that holds it."""

    def __init__(
        self,
        world: World,
        mesh: "Mesh | None",
        steps: int,
        *,
        losses_every: int = 0,
        layers_every: int = 0,
        groups: Groups | None = None,
        scores: bool = True,
        speed: Speed | None = None,
    ) -> None:
        """`losses_every` 0 makes about a hundred rows, `layers_every` 0 none; `scores`: also those of attention."""
        self._world, self._mesh, self._steps = world, mesh, steps
        self._losses_every = losses_every or max(1, -(-steps // ROWS))
        self._layers_every, self._scores = layers_every, scores
        self._losses = GroupLosses(groups) if groups else None
        self._since = 0
        self._layers: Layers | None = None
        self._speed = speed
        self._step, self._flops = 0, 0.0
        self._rows: dict[str, dict[str, Any]] = {}

    def at(self, model: Qwen3, step: int, batches: Sequence[Batch]) -> "Observer":
        """The witness of a step about to be taken."""
        self._step, self._rows = step, {}
        self._layers = None
        if self._layers_every and step % self._layers_every == 0:
            self._layers = Layers(model, self._world, self._mesh, scores=self._scores)
        if self._speed:
            self._flops = step_flops(model.config, batches)
        return self

    @contextmanager
    def looking(self, model: Qwen3, spread: Spread) -> Iterator[None]:
        with self._layers.looking(model, spread) if self._layers else nullcontext():
            yield

    def inputs(self, inputs: Inputs, segments: Tensor) -> Inputs:
        return self._layers.inputs(inputs, segments) if self._layers else inputs

    def gradients(self, model: Qwen3) -> None:
        if self._layers:
            self._layers.gradients(model)

    def updated(self, model: Qwen3, totals: Totals) -> None:
        if self._layers:
            self._rows[LAYERS] = self._layers.row(model)
            self._layers = None
        if self._losses and totals.groups is not None:
            self._losses.add(totals.groups)
            self._since += 1
            done = self._step + 1
            if done % self._losses_every == 0 or done == self._steps:
                self._rows[LOSSES] = {"steps": self._since, **self._losses.take()}
                self._since = 0

    def write(self, metrics: Metrics, step: int) -> None:
        """The rows of the step that was taken last, if it was one to be written down."""
        for record, row in self._rows.items():
            metrics.note(record, step, row)

    def timing(self, seconds: float) -> dict[str, float]:
        """Of the step that was taken last."""
        return self._speed.of(self._flops, seconds) if self._speed else {}

    def about(self) -> dict[str, Any]:
        """What is known before the first step."""
        return self._speed.about() if self._speed else {}

    def state_dict(self) -> dict[str, Any]:
        return {"since": self._since, "losses": self._losses.state_dict() if self._losses else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._losses and state["losses"]:
            self._since = state["since"]
            self._losses.load_state_dict(state["losses"])
