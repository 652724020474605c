"""Pipeline parallelism: every rank of a group holds some of the layers, and micro-batches flow through all of them.

The schedules are torch's own: one forward, one backward (1F1B, arXiv 2104.04473, section 2.2.1), and its interleaved
form (section 2.2.2) where ranks hold several parts of the depth.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from pensar.base.ranks import World
from pensar.model.config import ModelConfig
from pensar.model.moe import Routing, balance_loss, expert_counts, take_routings
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.balance import Balance
from pensar.train.loss import Totals, states_loss
from pensar.train.parallel.context import attend_over, routed_of
from pensar.train.parallel.depth import Part, parts_of
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.parts import local_of
from pensar.train.step import Spread, Work

Schedule = Schedule1F1B | ScheduleGPipe | ScheduleInterleaved1F1B | ScheduleLoopedBFS
Shape = tuple[int, int]


class Pipeline:
    """One rank's place in the pipeline."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._ends = mesh.ends
        self._schedules: dict[Shape, Schedule] = {}
        self._counters: dict[Shape, Schedule] = {}
        self._losses: _Losses | None = None
        self._routers: _Routers | None = None

    def balance(
        self, spread: Spread, model: Qwen3, num_tokens: int, batches: Sequence[Batch | None]
    ) -> Balance:
        """The balance of a step by the assignments of all its micro-batches, in a forward pass beforehand."""
        self._routers = routers = _Routers(model, self._mesh)
        with torch.no_grad():
            for batch in batches:
                assert batch is not None
                self._flow(self._counter, spread, model, batch)
                routers.take(self._mesh.layout.micro_batches)
        counts_LE = self._mesh.depth.all_reduce_(self._mesh.stage.all_reduce_(routers.counts_LE))
        return _PartBalance(model.config, num_tokens, self._mesh.stage, counts_LE)

    def backward(self, spread: Spread, model: Qwen3, batches: Sequence[Batch | None], work: Work) -> Tensor:
        """All micro-batches through the pipeline; every rank of it is given the same rows.

        Only the last rank knows the loss; the `Totals` of the others have their layers' part of the routers' losses.
        """
        sums = Totals.zeros(work.num_groups)
        self._routers = _Routers(model, self._mesh, work) if work.balance is not None else None
        for batch in batches:
            assert batch is not None
            self._losses = losses = _Losses(spread, model, batch, work)
            self._flow(self._schedule, spread, model, batch)
            sums += losses.sums
            if self._routers is not None:
                routed = self._routers.take(self._mesh.layout.micro_batches)
                sums[: len(routed)] += routed
        self._sum_ends(model)
        return sums

    def _flow(
        self,
        schedule_of: Callable[[Qwen3, Shape], Schedule],
        spread: Spread,
        model: Qwen3,
        batch: Batch,
    ) -> None:
        """One batch through all ranks of the pipeline, backward too where gradients are on."""
        inputs, depth = spread.inputs(batch), self._mesh.depth
        schedule = schedule_of(model, (len(batch.tokens), inputs.tokens.shape[1]))
        given = (inputs.tokens,) if depth.rank == 0 else ()
        segments = torch.from_numpy(batch.segments).to(self._mesh.device)
        if not torch.is_grad_enabled():
            schedule.eval(*given, positions=inputs.positions, segments=segments)
            return
        rows = torch.arange(len(batch.tokens)) if depth.rank == depth.size - 1 else None
        schedule.step(
            *given, target=rows, return_outputs=False, positions=inputs.positions, segments=segments
        )

    def _sum_ends(self, model: Qwen3) -> None:
        """The gradient of a tied embedding is the sum of those at the two ends that hold it."""
        if model.config.tied and self._ends is not None:
            gradient = model.model.embed_tokens.weight.grad
            assert gradient is not None
            self._ends.all_reduce_(local_of(gradient))

    def _schedule(self, model: Qwen3, shape: Shape) -> Schedule:
        if shape not in self._schedules:
            stages, count = self._stages(model), self._mesh.layout.micro_batches
            self._schedules[shape] = (
                Schedule1F1B(stages[0], count, loss_fn=self._loss, scale_grads=False)
                if len(stages) == 1
                else ScheduleInterleaved1F1B(stages, count, loss_fn=self._loss, scale_grads=False)
            )
        return self._schedules[shape]

    def _counter(self, model: Qwen3, shape: Shape) -> Schedule:
        if shape not in self._counters:
            stages, count = self._stages(model), self._mesh.layout.micro_batches
            self._counters[shape] = (
                ScheduleGPipe(stages[0], count) if len(stages) == 1 else ScheduleLoopedBFS(stages, count)
            )
        return self._counters[shape]

    def _stages(self, model: Qwen3) -> list[Any]:
        """This rank's parts of the depth as torch's schedules take them."""
        stages, group = [], self._mesh.depth.group
        for part in parts_of(model):
            part.forward = partial(self._forward, model, part)
            stages.append(PipelineStage(part, part.number, part.count, self._mesh.device, group=group))
        return stages

    def _forward(
        self, model: Qwen3, part: Part, stream: Tensor, *, positions: Tensor, segments: Tensor
    ) -> Tensor:
        """One part of `Qwen3.forward`: token ids or the stream in, the stream or states out.

        `segments` [B, T] are those of whole rows.
        """
        if part.is_first:
            stream = model.model.embed_tokens(stream)
        cos, sin = (table.to(stream.dtype) for table in model.rope_tables(positions))
        attend = attend_over(segments, self._mesh.context)
        for block in part.layers:
            stream = block(stream, cos, sin, attend)
        if self._routers is not None:
            stream = self._routers(part, stream, segments)
        out: Tensor = model.model.norm(stream) if part.is_last else stream
        return out

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
        return sum(self._totals.values(), start=Totals.zeros(self._batch.num_groups))

    def __call__(self, hidden: Tensor, rows: Tensor) -> Tensor:
        part = self._batch.rows(slice(int(rows[0]), int(rows[-1]) + 1))
        inputs, work = self._spread.inputs(part), self._work
        loss, totals = states_loss(self._model, hidden, part, inputs, work.normalisers, work.loss)
        # By first row: torch tries the loss on meaningless states before the first step, to learn its shapes.
        self._totals[int(rows[0])] = totals.tensor()
        return loss


class _PartBalance(Balance):
    """The balance of layers from `first` on; their losses are their part of the mean over all layers."""

    def __init__(
        self, config: ModelConfig, num_tokens: int, world: World, counts_LE: Tensor, first: int = 0
    ) -> None:
        super().__init__(config, num_tokens, world, counts_LE.device)
        self.counts_LE = counts_LE
        self._first = first
        self._config, self._stage = config, world

    def of(self, part: Part) -> Balance:
        return _PartBalance(self._config, int(self.num_tokens), self._stage, self.counts_LE, part.first)

    def loss(self, layers: list[Routing], real_N: Tensor) -> Tensor:
        mine_LE = self.counts_LE[self._first : self._first + len(layers)]
        part = balance_loss(layers, mine_LE, num_tokens=self.num_tokens, real_N=real_N)
        return part * (len(layers) / len(self.counts_LE))

    def z_loss(self, layers: list[Routing], real_N: Tensor) -> Tensor:
        return super().z_loss(layers, real_N) * (len(layers) / len(self.counts_LE))


class _Routers:
    """What the routers of a rank's layers add to a step: without `work` their assignments, with it their losses."""

    def __init__(self, model: Qwen3, mesh: Mesh, work: Work | None = None) -> None:
        self._mesh, self._work = mesh, work
        self._weight = model.config.router_balance_weight
        self._parts = parts_of(model)
        self.counts_LE = torch.zeros(model.config.num_layers, model.config.num_experts, device=mesh.device)
        self._seen: dict[int, list[Tensor]] = {part.number: [] for part in self._parts}

    def __call__(self, part: Part, stream: Tensor, segments: Tensor) -> Tensor:
        layers, real_N = take_routings(part), routed_of(segments, self._mesh)
        seen = self._seen[part.number]
        if self._work is None:
            seen.append(expert_counts(layers, real_N))
            return stream
        every, config = self._work.balance, self._work.loss
        assert isinstance(every, _PartBalance)
        balance = every.of(part)
        evenness = balance.loss(layers, real_N)
        loss, totals = self._weight * evenness, Totals(balance=float(evenness.detach()))
        if config.router_z_loss:
            router_z = balance.z_loss(layers, real_N)
            loss, totals.router_z = loss + config.router_z_loss * router_z, float(router_z.detach())
        seen.append(totals.tensor())
        with_loss: Tensor = _WithLoss.apply(stream, loss)  # type: ignore[no-untyped-call]
        return with_loss

    def take(self, micro_batches: int) -> Tensor:
        """Adds up what the last micro-batches gave; torch's own trial of the shapes came before them.

        Without `work` the assignments, layer by layer, also join `counts_LE`.
        """
        sums = []
        for part in self._parts:
            last = torch.stack(self._seen[part.number][-micro_batches:]).sum(0)
            self._seen[part.number] = []
            if self._work is None:
                self.counts_LE[part.first : part.stop] += last
            sums.append(last)
        return torch.stack(sums).sum(0) if self._work is not None else self.counts_LE


class _WithLoss(torch.autograd.Function):
    """The stream as it is; backward, a loss beside it gets the gradient 1."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, loss: Tensor) -> Tensor:
        return stream.clone()  # not a view: FSDP hangs its hooks on it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, torch.ones((), dtype=torch.float32, device=gradient.device)
