"""Pipeline parallelism: every rank of a group holds some of the layers, and micro-batches flow through all of them.

The schedule is one forward, one backward (1F1B, arXiv 2104.04473, section 2.2.1) of torch's own pipelining.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.loss import Totals, states_loss
from pensar.train.parallel.context import attend_over
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.parts import local_of
from pensar.train.step import Spread, Work


def cut_depth(model: Qwen3, mesh: Mesh) -> None:
    """Leaves this rank's layers in the model, under their names; the embedding at the start, norm and head at the end.

    A tied embedding is at both ends.
    """
    depth, layers = mesh.depth, model.model.layers
    first, stop = layers_of(depth.rank, depth.size, model.config.num_layers)
    for index in range(model.config.num_layers):
        if not first <= index < stop:
            del layers._modules[str(index)]  # noqa: SLF001 - `del layers[index]` would rename the others
    last = depth.rank == depth.size - 1
    if depth.rank and not (last and model.config.tied):
        model.model.embed_tokens = None  # type: ignore[assignment]
    if not last:
        model.model.norm = None  # type: ignore[assignment]
        model.lm_head = None
    model.forward = partial(_forward, model, mesh)  # type: ignore[method-assign]


def layers_of(rank: int, size: int, num_layers: int) -> tuple[int, int]:
    """First layer of a rank and the one after its last: equal shares, the earlier ranks one more where they differ."""
    share, more = divmod(num_layers, size)
    first = rank * share + min(rank, more)
    return first, first + share + (rank < more)


class Pipeline:
    """One rank's place in the pipeline."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._ends = mesh.ends
        self._schedules: dict[tuple[int, int], Schedule1F1B] = {}
        self._losses: _Losses | None = None

    def backward(self, spread: Spread, model: Qwen3, batches: Sequence[Batch | None], work: Work) -> Tensor:
        """All micro-batches through the pipeline; every rank of it is given the same rows.

        Only the last rank knows the loss; the `Totals` of the others are zero.
        """
        sums, depth = Totals().tensor(), self._mesh.depth
        for batch in batches:
            assert batch is not None
            self._losses = losses = _Losses(spread, model, batch, work)
            inputs = spread.inputs(batch)
            schedule = self._schedule(model, (len(batch.tokens), inputs.tokens.shape[1]))
            schedule.step(
                *((inputs.tokens,) if depth.rank == 0 else ()),
                target=torch.arange(len(batch.tokens)) if depth.rank == depth.size - 1 else None,
                return_outputs=False,
                positions=inputs.positions,
                segments=torch.from_numpy(batch.segments).to(self._mesh.device),
            )
            sums += losses.sums
        self._sum_ends(model)
        return sums

    def _sum_ends(self, model: Qwen3) -> None:
        """The gradient of a tied embedding is the sum of those at the two ends that hold it."""
        if model.config.tied and self._ends is not None:
            gradient = model.model.embed_tokens.weight.grad
            assert gradient is not None
            self._ends.all_reduce_(local_of(gradient))

    def _schedule(self, model: Qwen3, shape: tuple[int, int]) -> Schedule1F1B:
        if shape not in self._schedules:
            depth = self._mesh.depth
            stage = PipelineStage(model, depth.rank, depth.size, self._mesh.device, group=depth.group)
            count = self._mesh.layout.micro_batches
            self._schedules[shape] = Schedule1F1B(stage, count, loss_fn=self._loss, scale_grads=False)
        return self._schedules[shape]

    def _loss(self, hidden: Tensor, rows: Tensor) -> Tensor:
        assert self._losses is not None
        return self._losses(hidden, rows)


class _Losses:
    """The losses of a batch's rows as they leave the pipeline, and the sums behind them."""

    def __init__(self, spread: Spread, model: Qwen3, batch: Batch, work: Work) -> None:
        self._spread, self._model, self._batch, self._work = spread, model, batch, work
        self._totals: dict[int, Tensor] = {}

    @property
    def sums(self) -> Tensor:
        return sum(self._totals.values(), start=Totals().tensor())

    def __call__(self, hidden: Tensor, rows: Tensor) -> Tensor:
        part = self._batch.rows(slice(int(rows[0]), int(rows[-1]) + 1))
        inputs, work = self._spread.inputs(part), self._work
        loss, totals = states_loss(self._model, hidden, part, inputs, work.normalisers, work.loss)
        # By first row: torch tries the loss on meaningless states before the first step, to learn its shapes.
        self._totals[int(rows[0])] = totals.tensor()
        return loss


def _forward(model: Qwen3, mesh: Mesh, stream: Tensor, *, positions: Tensor, segments: Tensor) -> Tensor:
    """The part of `Qwen3.forward` whose layers are here: token ids or the stream in, the stream or the states out.

    `segments` [B, T] are those of whole rows.
    """
    parts = model.model
    if mesh.depth.rank == 0:
        stream = parts.embed_tokens(stream)
    cos, sin = (table.to(stream.dtype) for table in model.rope_tables(positions))
    attend = attend_over(segments, mesh.context)
    for block in parts.layers:
        stream = block(stream, cos, sin, attend)
    last = mesh.depth.rank == mesh.depth.size - 1
    out: Tensor = parts.norm(stream) if last else stream
    return out
