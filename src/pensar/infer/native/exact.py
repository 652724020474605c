"""Exact: a model whose states and scores are, bit for bit, those of the native engine, and which learns as before.

What a trainer computes of a text then differs from what the engine said of it by nothing, whatever rows, lengths and
chunks either saw. Values come from the library, gradients from torch's own pass over the same weights: one more forward
pass, faster than the one beside it. With int8 weights the values are the quantised engine's.
Shape legend: B rows, T tokens, N tokens of all rows, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pensar.infer.native.runner import Kind, NativeRunner
from pensar.infer.request import Ints
from pensar.infer.step import PAGE, StepBatch
from pensar.infer.sync import weights_stamp
from pensar.model.attention import Attend
from pensar.model.qwen3 import Qwen3


@contextmanager
def exact(model: Qwen3, weights: Kind = "float32", threads: int | None = None) -> Iterator[None]:
    """Within it `model(...)` and `model.logits(...)` give the engine's bits; weights may be changed between calls.

    A document begins where positions do not go on from those before. Raises RunError where the library cannot be
    built, ConfigError for a model that is not on the CPU.
    """
    engine = _Engine(model, weights, threads)
    forward = model.forward

    def states(tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        values_BTD = engine.states(tokens_BT, positions_BT)
        if not torch.is_grad_enabled():
            return values_BTD
        valued: Tensor = _Valued.apply(forward(tokens_BT, positions_BT, attend), values_BTD)  # type: ignore[no-untyped-call]
        return valued

    def logits(hidden: Tensor) -> Tensor:
        head = model.model.embed_tokens if model.lm_head is None else model.lm_head
        scores: Tensor = _Scores.apply(hidden, head.weight, engine)  # type: ignore[no-untyped-call]
        return scores

    vars(model)["forward"], vars(model)["logits"] = states, logits
    try:
        yield
    finally:
        del vars(model)["forward"], vars(model)["logits"]


class _Engine:
    """A runner of its own, its weights packed anew when the model's have changed."""

    def __init__(self, model: Qwen3, weights: Kind, threads: int | None) -> None:
        self._model = model
        self._runner = NativeRunner(model, weights, threads=threads)
        self._stamp = weights_stamp(model)

    def states(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Last hidden states [B, T, D]."""
        batch = _documents(tokens_BT, positions_BT)
        self._runner.reserve(int(batch.pages_RP.max()) + 1)
        return self._current().hidden(batch).view(*tokens_BT.shape, -1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self._current().logits(hidden_ND)

    def _current(self) -> NativeRunner:
        stamp = weights_stamp(self._model)
        if stamp != self._stamp:
            self._runner.refresh()
            self._stamp = stamp
        return self._runner


def _documents(tokens_BT: Tensor, positions_BT: Tensor) -> StepBatch:
    """Every document of every row as a row of the engine, with pages of its own."""
    positions_BT = positions_BT.expand_as(tokens_BT)
    begins_BT = torch.ones_like(positions_BT, dtype=torch.bool)
    begins_BT[:, 1:] = positions_BT[:, 1:] != positions_BT[:, :-1] + 1
    tokens_N: Ints = tokens_BT.flatten().numpy()
    starts = np.append(np.flatnonzero(begins_BT.flatten().numpy()), len(tokens_N))
    lengths = np.diff(starts)
    counts = -(-lengths // PAGE)
    firsts = np.cumsum(counts) - counts
    pages_RP = np.minimum(firsts[:, None] + np.arange(counts.max()), firsts[-1] + counts[-1] - 1)
    return StepBatch(
        tokens_N=tokens_N,
        positions_N=positions_BT.flatten().numpy(),
        starts=starts,
        lengths_R=lengths,
        pages_RP=pages_RP,
        wanted_S=np.arange(len(tokens_N)),
    )


class _Valued(torch.autograd.Function):
    """The engine's values with the gradient of torch's."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Scores(torch.autograd.Function):
    """The output projection by the library, its gradients by torch."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_VD: nn.Parameter, engine: _Engine) -> Tensor:
        ctx.save_for_backward(hidden, weight_VD)
        return engine.logits(hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight_VD = ctx.saved_tensors
        grad_NV, hidden_ND = grad.flatten(0, -2), hidden.flatten(0, -2)
        return grad @ weight_VD, grad_NV.T @ hidden_ND, None
