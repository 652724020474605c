"""Meshed: how a mesh of ranks takes part in one step: rows to data ranks, columns to those that split a context."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch
from pensar.train.loss import Inputs, inputs_of
from pensar.train.parallel.context import attend_over, columns_of
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.pipeline import Pipeline
from pensar.train.step import Updates, Work, one_by_one


class Meshed:
    """The `Spread` of a sharded model; its gradients are summed in the backward pass."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.data: World = mesh.data
        self.tokens: World = mesh.tokens
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
            tokens=row.tokens, positions=row.positions, segments=segments, behaviour=row.behaviour, **blank
        )

    def inputs(self, batch: Batch) -> Inputs:
        whole = inputs_of(batch, self._mesh.device)
        segments = torch.from_numpy(batch.segments).to(self._mesh.device)
        context = self._mesh.context
        attend = attend_over(segments, context)
        if context.size == 1:
            return whole._replace(attend=attend)
        columns = columns_of(context.rank, context.size, batch.tokens.shape[1]).to(self._mesh.device)
        return Inputs(
            tokens=whole.tokens[:, columns],
            positions=whole.positions[:, columns],
            attend=attend,
            real_N=(segments[:, columns] != 0).flatten(),
            columns=columns,
        )

    def backward(self, model: Qwen3, batches: Sequence[Batch | None], work: Work) -> Tensor:
        if self._depth is not None:
            return self._depth.backward(self, model, batches, work)
        return one_by_one(self, model, batches, work)

    def reduce_gradients(self, optimizer: Updates) -> None:
        """The backward pass has done it."""
