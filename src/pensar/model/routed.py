"""Experts in training on a CPU: one operator from tokens to each token's sum over its experts, and one back.

Of all M rows only what the first product gives is kept for the backward pass besides the inputs: with 4 experts a token
a step takes a third less memory than by grouped products. As an operator of its own it stays one step for selective
recomputation and for shape propagation. Products and results are in the type of the tokens; the matrices, and so their
gradients, may be wider.
Shape legend: N tokens, D hidden, E experts, I expert width, k experts per token, M = N k, R rows sorted by expert, those
of each expert rounded up.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDED = 32
"""The rows of an expert in bfloat16 are a multiple of this. The library translates a kernel for every new shape, which
takes five times as long as 256 rows do, and the rows of an expert are another number at every step."""


class Rows:
    """Where the tokens' rows lie: sorted by expert, each expert's rounded up by rows of weight zero."""

    def __init__(self, x_ND: Tensor, weights_Nk: Tensor, order_M: Tensor, counts_E: Tensor) -> None:
        counts = counts_E.tolist()
        self.sizes = [_rounded(count, x_ND.dtype) for count in counts]
        shift_E = (torch.tensor(self.sizes) - counts_E).cumsum(0).roll(1)
        shift_E[0] = 0
        self._order_M, self._at_M = order_M, torch.arange(len(order_M)) + shift_E.repeat_interleave(counts_E)
        num = sum(self.sizes)
        self.tokens_R = order_M.new_zeros(num).index_copy_(0, self._at_M, order_M // weights_Nk.shape[1])
        weights_M = weights_Nk.flatten().to(x_ND.dtype)[order_M]
        self.weights_R1 = weights_M.new_zeros(num).index_copy_(0, self._at_M, weights_M)[:, None]
        self._rows_Nk = torch.empty_like(weights_Nk, dtype=torch.int64)
        self._rows_Nk.view(-1)[order_M] = self._at_M

    def summed(self, y_RD: Tensor) -> Tensor:
        """The sum of each token's rows [N, D]."""
        return F.embedding_bag(self._rows_Nk, y_RD, mode="sum")

    def by_token(self, values_R: Tensor) -> Tensor:
        """The value of each token's rows [N, k]."""
        return values_R[self._rows_Nk]

    def products(self, x: Tensor, matrices: Tensor, out: Tensor) -> Tensor:
        """Each row times its expert's matrix [E, inputs, outputs]."""
        for expert, part in self._parts():
            torch.mm(x[part], matrices[expert].to(x.dtype), out=out[part])
        return out

    def gradient(self, left: Tensor, right: Tensor, matrices: Tensor) -> Tensor:
        """left^T right over the rows of each expert, the gradient of `matrices`."""
        out = torch.empty_like(matrices)
        for expert, part in self._parts():
            if out.dtype == left.dtype:
                torch.mm(left[part].T, right[part], out=out[expert])
            else:
                out[expert] = left[part].T @ right[part]
        return out

    def _parts(self) -> Iterator[tuple[int, slice]]:
        start = 0
        for expert, size in enumerate(self.sizes):
            yield expert, slice(start, start + size)
            start += size


@torch.library.custom_op("pensar::routed_swiglu", mutates_args=(), device_types="cpu")
def routed_swiglu(
    x_ND: Tensor,
    weights_Nk: Tensor,
    order_M: Tensor,
    counts_E: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each token's sum of its experts' outputs times their weights [N, D]; and gate and up [R and more, 2I], for the
    backward pass. `order_M` is the place in `weights_Nk` of each row, `counts_E` the number of rows of each expert."""
    rows = Rows(x_ND, weights_Nk, order_M, counts_E)
    room_R2I = _room(x_ND, order_M, gate_up_E2ID)
    x_RD = x_ND[rows.tokens_R]
    gate_R, up_R = rows.products(x_RD, gate_up_E2ID.mT, room_R2I[: len(x_RD)]).chunk(2, -1)
    h_RI = F.silu(gate_R).mul_(up_R).mul_(rows.weights_R1)
    return rows.summed(rows.products(h_RI, down_EDI.mT, x_RD)), room_R2I


@routed_swiglu.register_fake
def _(
    x_ND: Tensor,
    weights_Nk: Tensor,
    order_M: Tensor,
    counts_E: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), _room(x_ND, order_M, gate_up_E2ID)


@torch.library.custom_op("pensar::routed_swiglu_backward", mutates_args=(), device_types="cpu")
def routed_swiglu_backward(
    grad_ND: Tensor,
    room_R2I: Tensor,
    x_ND: Tensor,
    weights_Nk: Tensor,
    order_M: Tensor,
    counts_E: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, their experts' weights, and both matrices of the experts."""
    rows = Rows(x_ND, weights_Nk, order_M, counts_E)
    rows_RD = grad_ND[rows.tokens_R]
    gate_R, up_R = room_R2I[: len(rows_RD)].chunk(2, -1)
    dgate_up_R2I = torch.empty_like(room_R2I[: len(rows_RD)])
    dgate_R, dup_R = dgate_up_R2I.chunk(2, -1)
    silu_RI = F.silu(gate_R)
    h_RI = silu_RI * up_R
    dh_RI = rows.products(rows_RD, down_EDI, torch.empty_like(h_RI))
    # <grad, W h> = <W^T grad, h>: the output itself need not be kept.
    dweights_R = torch.sum(dh_RI * h_RI, -1, dtype=weights_Nk.dtype)
    ddown_EDI = rows.gradient(rows_RD, h_RI.mul_(rows.weights_R1), down_EDI)
    torch.mul(dh_RI.mul_(rows.weights_R1), silu_RI, out=dup_R)
    torch.ops.aten.silu_backward.grad_input(dh_RI.mul_(up_R), gate_R, grad_input=dgate_R)
    torch.index_select(x_ND, 0, rows.tokens_R, out=rows_RD)
    dgate_up_E2ID = rows.gradient(dgate_up_R2I, rows_RD, gate_up_E2ID)
    dx_ND = rows.summed(rows.products(dgate_up_R2I, gate_up_E2ID, rows_RD))
    return dx_ND, rows.by_token(dweights_R), dgate_up_E2ID, ddown_EDI


@routed_swiglu_backward.register_fake
def _(grad_ND: Tensor, room_R2I: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weights, gate_up, down = (torch.empty_like(inputs[place]) for place in (0, 1, 4, 5))
    return x, weights, gate_up, down


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx: Any, grad_ND: Tensor, _: None) -> tuple[Tensor | None, ...]:
    dx_ND, dweights_Nk, dgate_up, ddown = routed_swiglu_backward(grad_ND, *ctx.saved_tensors)
    return dx_ND, dweights_Nk, None, None, dgate_up, ddown


routed_swiglu.register_autograd(_backward, setup_context=_keep)


def _rounded(count: int, dtype: torch.dtype) -> int:
    return -(-count // ROUNDED) * ROUNDED if dtype == torch.bfloat16 else count


def _room(x_ND: Tensor, order_M: Tensor, gate_up_E2ID: Tensor) -> Tensor:
    """For gate and up of all rows, however many each expert gets."""
    num, width = gate_up_E2ID.shape[:2]
    more = num * (ROUNDED - 1) if x_ND.dtype == torch.bfloat16 else 0
    return x_ND.new_empty(len(order_M) + more, width)
