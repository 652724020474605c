"""Meshed: how a mesh of ranks takes part in one step: rows to data ranks, columns to those that split a context."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pensar.base.ranks import World
from pensar.model.moe import SparseMLP
from pensar.model.qwen3 import Block, Qwen3
from pensar.text.packing import Batch
from pensar.train.balance import Balance
from pensar.train.loss import Inputs, LossConfig, Totals, inputs_of
from pensar.train.parallel.context import attend_over, columns_of, routed_of
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.parts import local_of
from pensar.train.parallel.pipeline import Pipeline
from pensar.train.step import Updates, Work, counted, one_by_one


class Meshed:
    """The `Spread` of a sharded model; its gradients are summed in the backward pass."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.data: World = mesh.data
        self.tokens: World = mesh.tokens
        self.routed: World = mesh.stage
        self._depth = Pipeline(mesh) if mesh.layout.pp > 1 else None

    def share(self, batch: Batch) -> Batch:
        """This rank's rows; where there are fewer rows than ranks, a row of padding: all ranks must take part."""
        if self.data.rank < len(batch.tokens):
            return batch.rows(slice(self.data.rank, None, self.data.size))
        row = batch.rows(slice(0, 1))
        weights = {name: getattr(row, name) for name in ("ce", "pg", "kl")}
        blank = {name: None if values is None else np.zeros_like(values) for name, values in weights.items()}
        segments = np.zeros_like(row.segments)
        return Batch(
            tokens=row.tokens,
            positions=row.positions,
            segments=segments,
            behaviour=row.behaviour,
            groups=row.groups,
            num_groups=row.num_groups,
            **blank,
        )

    def inputs(self, batch: Batch) -> Inputs:
        whole = inputs_of(batch, self._mesh.device)
        segments = torch.from_numpy(batch.segments).to(self._mesh.device)
        context, routed = self._mesh.context, routed_of(segments, self._mesh)
        attend = attend_over(segments, context)
        if context.size == 1:
            return whole._replace(attend=attend, routed_N=routed)
        columns = columns_of(context.rank, context.size, batch.tokens.shape[1]).to(self._mesh.device)
        return Inputs(
            tokens=whole.tokens[:, columns],
            positions=whole.positions[:, columns],
            attend=attend,
            real_N=(segments[:, columns] != 0).flatten(),
            columns=columns,
            routed_N=routed,
        )

    def balance(
        self, model: Qwen3, num_tokens: int, batches: Sequence[Batch | None], config: LossConfig
    ) -> Balance:
        if self._depth is not None:
            return self._depth.balance(self, model, num_tokens, batches)
        return counted(self, model, num_tokens, batches, config)

    def backward(self, model: Qwen3, batches: Sequence[Batch | None], work: Work) -> Tensor:
        if self._depth is not None:
            sums = self._depth.backward(self, model, batches, work)
        else:
            sums = one_by_one(self, model, batches, work)
        if work.balance is not None and self._mesh.layout.tp > 1:
            self._sum_heads(model, sums)
        return sums

    def reduce_gradients(self, optimizer: Updates) -> None:
        """The backward pass has done it."""

    def _sum_heads(self, model: Qwen3, sums: Tensor) -> None:
        """Routers see the part of the tokens that their tensor rank holds: so their gradients and losses are parts."""
        heads = self._mesh.heads.get_group()
        for block in model.model.layers:
            assert isinstance(block, Block) and isinstance(block.mlp, SparseMLP)  # noqa: PT018
            gradient = block.mlp.gate.weight.grad
            assert gradient is not None
            dist.all_reduce(local_of(gradient), group=heads)
        names = list(vars(Totals()))
        for index in (names.index("balance"), names.index("router_z")):
            dist.all_reduce(sums[index : index + 1], group=heads)
