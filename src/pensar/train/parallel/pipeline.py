"""Pipeline parallelism: every rank of a group holds some of the layers, and micro-batches flow through all of them.

The schedule is one forward, one backward (1F1B, arXiv 2104.04473, section 2.2.1) of torch's own pipelining.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from pensar.base.ranks import World
from pensar.model.config import ModelConfig
from pensar.model.moe import Routing, balance_loss, expert_counts, routings
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.balance import Balance
from pensar.train.loss import Totals, states_loss
from pensar.train.parallel.context import attend_over, routed_of
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
        self._counters: dict[tuple[int, int], ScheduleGPipe] = {}
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
        mesh = self._mesh
        counts_LE = mesh.stage.all_reduce_(routers.counts_LE)
        every_LE = torch.cat([part.to(mesh.device) for part in mesh.depth.gather(counts_LE.cpu())])
        first, _ = layers_of(mesh.depth.rank, mesh.depth.size, model.config.num_layers)
        return _StageBalance(model.config, num_tokens, mesh.stage, every_LE, first)

    def backward(self, spread: Spread, model: Qwen3, batches: Sequence[Batch | None], work: Work) -> Tensor:
        """All micro-batches through the pipeline; every rank of it is given the same rows.

        Only the last rank knows the loss; the `Totals` of the others have their layers' part of the routers' losses.
        """
        sums = Totals().tensor()
        self._routers = _Routers(model, self._mesh, work) if work.balance is not None else None
        for batch in batches:
            assert batch is not None
            self._losses = losses = _Losses(spread, model, batch, work)
            self._flow(self._schedule, spread, model, batch)
            sums += losses.sums
            if self._routers is not None:
                sums += self._routers.take(self._mesh.layout.micro_batches)
        self._sum_ends(model)
        return sums

    def _flow(
        self,
        schedule_of: Callable[[Qwen3, tuple[int, int]], Schedule1F1B | ScheduleGPipe],
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

    def _schedule(self, model: Qwen3, shape: tuple[int, int]) -> Schedule1F1B:
        if shape not in self._schedules:
            count = self._mesh.layout.micro_batches
            stage = self._stage(model)
            self._schedules[shape] = Schedule1F1B(stage, count, loss_fn=self._loss, scale_grads=False)
        return self._schedules[shape]

    def _counter(self, model: Qwen3, shape: tuple[int, int]) -> ScheduleGPipe:
        if shape not in self._counters:
            self._counters[shape] = ScheduleGPipe(self._stage(model), self._mesh.layout.micro_batches)
        return self._counters[shape]

    def _stage(self, model: Qwen3) -> PipelineStage:
        model.forward = partial(self._forward, model)  # type: ignore[method-assign]
        depth = self._mesh.depth
        return PipelineStage(model, depth.rank, depth.size, self._mesh.device, group=depth.group)

    def _forward(self, model: Qwen3, stream: Tensor, *, positions: Tensor, segments: Tensor) -> Tensor:
        """The part of `Qwen3.forward` whose layers are here: token ids or the stream in, the stream or states out.

        `segments` [B, T] are those of whole rows.
        """
        parts, depth = model.model, self._mesh.depth
        if depth.rank == 0:
            stream = parts.embed_tokens(stream)
        cos, sin = (table.to(stream.dtype) for table in model.rope_tables(positions))
        attend = attend_over(segments, self._mesh.context)
        for block in parts.layers:
            stream = block(stream, cos, sin, attend)
        if self._routers is not None:
            stream = self._routers(stream, segments)
        out: Tensor = parts.norm(stream) if depth.rank == depth.size - 1 else stream
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
        return sum(self._totals.values(), start=Totals().tensor())

    def __call__(self, hidden: Tensor, rows: Tensor) -> Tensor:
        part = self._batch.rows(slice(int(rows[0]), int(rows[-1]) + 1))
        inputs, work = self._spread.inputs(part), self._work
        loss, totals = states_loss(self._model, hidden, part, inputs, work.normalisers, work.loss)
        # By first row: torch tries the loss on meaningless states before the first step, to learn its shapes.
        self._totals[int(rows[0])] = totals.tensor()
        return loss


class _StageBalance(Balance):
    """The balance of one rank's layers; its losses are their part of the mean over all layers."""

    def __init__(
        self, config: ModelConfig, num_tokens: int, world: World, counts_LE: Tensor, first: int
    ) -> None:
        super().__init__(config, num_tokens, world, counts_LE.device)
        self.counts_LE = counts_LE
        self._first = first

    def loss(self, layers: list[Routing], real_N: Tensor) -> Tensor:
        mine_LE = self.counts_LE[self._first : self._first + len(layers)]
        part = balance_loss(layers, mine_LE, num_tokens=self.num_tokens, real_N=real_N)
        return part * (len(layers) / len(self.counts_LE))

    def z_loss(self, layers: list[Routing], real_N: Tensor) -> Tensor:
        return super().z_loss(layers, real_N) * (len(layers) / len(self.counts_LE))


class _Routers:
    """What the routers of one rank's layers add to a step: without `work` their assignments, with it their losses."""

    def __init__(self, model: Qwen3, mesh: Mesh, work: Work | None = None) -> None:
        self._model, self._mesh, self._work = model, mesh, work
        self.counts_LE = torch.zeros(len(model.model.layers), model.config.num_experts, device=mesh.device)
        self._seen: list[Tensor] = []

    def __call__(self, stream: Tensor, segments: Tensor) -> Tensor:
        layers, real_N = routings(self._model), routed_of(segments, self._mesh)
        if self._work is None:
            self._seen.append(expert_counts(layers, real_N))
            return stream
        balance, config = self._work.balance, self._work.loss
        assert balance is not None
        evenness = balance.loss(layers, real_N)
        loss, totals = (
            self._model.config.router_balance_weight * evenness,
            Totals(balance=float(evenness.detach())),
        )
        if config.router_z_loss:
            router_z = balance.z_loss(layers, real_N)
            loss, totals.router_z = loss + config.router_z_loss * router_z, float(router_z.detach())
        self._seen.append(totals.tensor())
        with_loss: Tensor = _WithLoss.apply(stream, loss)  # type: ignore[no-untyped-call]
        return with_loss

    def take(self, micro_batches: int) -> Tensor:
        """Adds up what the last micro-batches gave; torch's own trial of the shapes came before them."""
        last = torch.stack(self._seen[-micro_batches:]).sum(0)
        self._seen = []
        if self._work is None:
            self.counts_LE += last
        return last


class _WithLoss(torch.autograd.Function):
    """The stream as it is; backward, a loss beside it gets the gradient 1."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, loss: Tensor) -> Tensor:
        return stream.clone()  # not a view: FSDP hangs its hooks on it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, torch.ones((), dtype=torch.float32, device=gradient.device)
