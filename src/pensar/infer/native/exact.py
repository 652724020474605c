"""Exact: a model whose states and scores are, bit for bit, those of the native engine, and which learns as before.

What a trainer computes of a text then differs from what the engine said of it by nothing, whatever rows, lengths and
chunks either saw. Values come from the library, gradients from torch's own pass over the same weights: one more forward
pass, faster than the one beside it. With int8 weights the values are the quantised engine's.
Shape legend: B rows, T tokens, N tokens of all rows, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pensar.base.errors import ConfigError
from pensar.infer.native.runner import Kind, NativeRunner
from pensar.infer.request import Ints
from pensar.infer.step import PAGE, Runner, StepBatch
from pensar.model.attention import Attend
from pensar.model.qwen3 import Qwen3


@contextmanager
def exact(model: Qwen3, weights: Kind = "float32", threads: int | None = None) -> Iterator[None]:
    """Within it `model(...)` and `model.logits(...)` give the engine's bits; weights may be changed between passes.

    A document begins where positions do not go on from those before. Raises RunError where the library cannot be
    built, ConfigError for a model that is not on the CPU or is within `exact` already.
    """
    if "logits" in vars(model):
        raise ConfigError("the model computes exactly already; leave that `with exact(...)` before the next")
    engine = _Engine(model, weights, threads)
    forward = model.forward

    def states(tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        values_BTD = engine.states(tokens_BT, positions_BT)
        # Routers in training note where they sent the tokens, which their balance is told from, without a gradient too.
        noted = model.training and model.config.num_experts > 0
        if not torch.is_grad_enabled() and not noted:
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


def exact_as(runner: Runner) -> AbstractContextManager[None] | None:
    """`exact` for the module of an engine's runner, with weights as it has them; None where it computes with torch."""
    return exact(runner.model, runner.weights) if isinstance(runner, NativeRunner) else None


class _Engine:
    """A runner of its own, its weights packed anew for every pass: fused optimisers change them without a trace."""

    def __init__(self, model: Qwen3, weights: Kind, threads: int | None) -> None:
        self._runner = NativeRunner(model, weights, threads=threads)

    def states(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Last hidden states [B, T, D]."""
        batch, source_N = _documents(tokens_BT, positions_BT)
        self._runner.reserve(int(batch.pages_RP.max()) + 1)
        self._runner.refresh()
        return self._runner.hidden(batch)[source_N].view(*tokens_BT.shape, -1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """By the weights of the last pass."""
        return self._runner.logits(hidden_ND)


def _documents(tokens_BT: Tensor, positions_BT: Tensor) -> tuple[StepBatch, Tensor]:
    """Documents as rows of the engine, and where in the batch each of the N tokens stands.

    What documents begin with alike is computed once, whole pages of it, and equal ones altogether: a group's replies
    have one prompt, and padding is made of documents that are the same token.
    """
    positions_BT = positions_BT.expand_as(tokens_BT)
    begins_BT = torch.ones_like(positions_BT, dtype=torch.bool)
    begins_BT[:, 1:] = positions_BT[:, 1:] != positions_BT[:, :-1] + 1
    tokens_N: Ints = tokens_BT.flatten().numpy()
    positions_N: Ints = positions_BT.flatten().numpy()
    begins = np.flatnonzero(begins_BT.flatten().numpy())
    stops = np.append(begins[1:], len(tokens_N))
    alone = begins[stops - begins == 1]
    _, first_of, same = np.unique(
        (positions_N[alone] << 32) + tokens_N[alone], return_index=True, return_inverse=True
    )
    kept = np.ones(len(begins), np.bool_)
    kept[stops - begins == 1] = np.isin(alone, alone[first_of])
    documents = list(zip(begins[kept].tolist(), stops[kept].tolist(), strict=True))
    # Sorted, every document stands behind one that shares the longest beginning with it.
    documents.sort(key=lambda span: (positions_N[span[0]], tokens_N[slice(*span)].tobytes()))
    source_N = np.empty(len(tokens_N), np.int64)
    computed: list[Ints] = []
    starts, lengths, tables = [0], [], []
    before, pages, num_pages = (0, 0), list[int](), 0
    for first, stop in documents:
        common = _common(tokens_N[slice(*before)], tokens_N[first:stop])
        if positions_N[first] != positions_N[before[0]]:
            common = 0
        equal = common == stop - first == before[1] - before[0]
        known = common if equal else common // PAGE * PAGE
        source_N[first : first + known] = source_N[before[0] : before[0] + known]
        if equal:
            continue
        own = stop - first - known
        source_N[first + known : stop] = np.arange(starts[-1], starts[-1] + own)
        computed.append(np.arange(first + known, stop))
        starts.append(starts[-1] + own)
        lengths.append(stop - first)
        pages = [*pages[: known // PAGE], *range(num_pages, num_pages + -(-own // PAGE))]
        tables.append(pages)
        before, num_pages = (first, stop), num_pages + -(-own // PAGE)
    pages_RP = np.zeros((len(tables), max(map(len, tables))), np.int64)
    for row, table in enumerate(tables):
        pages_RP[row, : len(table)] = table
    source_N[alone] = source_N[alone[first_of[same]]]
    which_N = np.concatenate(computed)
    batch = StepBatch(
        tokens_N=tokens_N[which_N],
        positions_N=positions_N[which_N],
        starts=np.asarray(starts),
        lengths_R=np.asarray(lengths),
        pages_RP=pages_RP,
        wanted_S=np.arange(len(which_N)),
    )
    return batch, torch.from_numpy(source_N)


def _common(one: Ints, other: Ints) -> int:
    """How many tokens two documents begin with alike."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


class _Valued(torch.autograd.Function):
    """The engine's values with the gradient of torch's."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = own.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


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
        dtype = weight_VD.dtype
        grad_NV, hidden_ND = grad.flatten(0, -2).to(dtype), hidden.flatten(0, -2).to(dtype)
        return (grad_NV @ weight_VD).view(hidden.shape).to(hidden.dtype), grad_NV.T @ hidden_ND, None
