"""Experts in training on a CPU: gather, SwiGLU and weighted sum expert by expert, while its rows are in the cache.

Nothing of all M rows is written but what the first product gives, which is all that is kept for the backward pass
besides the inputs: with 4 experts a token a step takes a third less memory than by grouped products. As an operator of
its own it stays one step for selective recomputation and for shape propagation.
Shape legend: N tokens, D hidden, E experts, I expert width, k experts per token, M = N k rows sorted by expert, m rows
of one expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("pensar::routed_swiglu", mutates_args=(), device_types="cpu")
def routed_swiglu(
    x_ND: Tensor,
    weights_Nk: Tensor,
    order_M: Tensor,
    counts_E: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each token's sum of its experts' outputs times their weights [N, D]; and gate and up [M, 2I], for the backward
    pass. `order_M` is the place in `weights_Nk` of each row, `counts_E` the number of rows of each expert."""
    out_ND, gate_up_M2I = torch.zeros_like(x_ND), x_ND.new_empty(len(order_M), gate_up_E2ID.shape[1])
    weights_M1 = weights_Nk.flatten()[order_M, None]
    memory_mD = x_ND.new_empty(int(counts_E.max()), x_ND.shape[1])
    for expert, rows, tokens_m in _segments(order_M, counts_E, weights_Nk.shape[1]):
        x_mD = y_mD = memory_mD[: len(tokens_m)]
        torch.index_select(x_ND, 0, tokens_m, out=x_mD)
        gate, up = torch.mm(x_mD, gate_up_E2ID[expert].T, out=gate_up_M2I[rows]).chunk(2, -1)
        torch.mm(F.silu(gate).mul_(up), down_EDI[expert].T, out=y_mD)
        out_ND.index_add_(0, tokens_m, y_mD.mul_(weights_M1[rows]))
    return out_ND, gate_up_M2I


@routed_swiglu.register_fake
def _(
    x_ND: Tensor,
    weights_Nk: Tensor,
    order_M: Tensor,
    counts_E: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), x_ND.new_empty(len(order_M), gate_up_E2ID.shape[1])


@torch.library.custom_op("pensar::routed_swiglu_backward", mutates_args=(), device_types="cpu")
def routed_swiglu_backward(
    grad_ND: Tensor,
    gate_up_M2I: Tensor,
    x_ND: Tensor,
    weights_Nk: Tensor,
    order_M: Tensor,
    counts_E: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, their experts' weights, and both matrices of the experts."""
    dx_ND, dgate_up_E2ID = torch.zeros_like(x_ND), torch.empty_like(gate_up_E2ID)
    ddown_EDI = torch.empty_like(down_EDI)
    weights_M1 = weights_Nk.flatten()[order_M, None]
    dweights_M = weights_Nk.new_empty(len(order_M))
    most, width = int(counts_E.max()), down_EDI.shape[2]
    memory_mD, memory_m2I = x_ND.new_empty(most, x_ND.shape[1]), x_ND.new_empty(most, 2 * width)
    memory_3mI = x_ND.new_empty(3, most, width)
    for expert, rows, tokens_m in _segments(order_M, counts_E, weights_Nk.shape[1]):
        gate, up = gate_up_M2I[rows].chunk(2, -1)
        weights_m1, m = weights_M1[rows], slice(len(tokens_m))
        grad_mD = x_mD = dx_mD = memory_mD[m]
        dgate_up_m2I = memory_m2I[m]
        dgate, dup = dgate_up_m2I.chunk(2, -1)
        silu_mI, h_mI, dh_mI = memory_3mI[:, m].unbind()
        torch.index_select(grad_ND, 0, tokens_m, out=grad_mD)
        torch.ops.aten.silu.out(gate, out=silu_mI)
        torch.mul(silu_mI, up, out=h_mI)
        torch.mm(grad_mD, down_EDI[expert], out=dh_mI)
        # <grad, W h> = <W^T grad, h>: the output itself need not be kept.
        torch.linalg.vecdot(dh_mI, h_mI, out=dweights_M[rows])
        torch.mm(grad_mD.T, h_mI.mul_(weights_m1), out=ddown_EDI[expert])
        torch.mul(dh_mI.mul_(weights_m1), silu_mI, out=dup)
        torch.ops.aten.silu_backward.grad_input(dh_mI.mul_(up), gate, grad_input=dgate)
        torch.index_select(x_ND, 0, tokens_m, out=x_mD)
        torch.mm(dgate_up_m2I.T, x_mD, out=dgate_up_E2ID[expert])
        dx_ND.index_add_(0, tokens_m, torch.mm(dgate_up_m2I, gate_up_E2ID[expert], out=dx_mD))
    dweights_Nk = torch.empty_like(weights_Nk)
    dweights_Nk.view(-1)[order_M] = dweights_M
    return dx_ND, dweights_Nk, dgate_up_E2ID, ddown_EDI


@routed_swiglu_backward.register_fake
def _(grad_ND: Tensor, gate_up_M2I: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _segments(order_M: Tensor, counts_E: Tensor, k: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Each expert, its rows, and the tokens that they are of."""
    start, tokens_M = 0, order_M // k
    for expert, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        yield expert, rows, tokens_M[rows]
        start += count
