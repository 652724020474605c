"""Experts in training on a CPU: gather, SwiGLU and weighted sum expert by expert, while its rows are in the cache.

Nothing of all M rows is written but what the first product gives, which is all that is kept for the backward pass
besides the inputs: with 4 experts a token a step takes a third less memory than by grouped products. As an operator of
its own it stays one step for selective recomputation and for shape propagation.
Products are in the type of the tokens, sums and gradients of matrices in the type of the matrices, which may be wider.
Shape legend: N tokens, D hidden, E experts, I expert width, k experts per token, M = N k rows sorted by expert, m rows
of one expert, R the same rounded up.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.model import native

ROUNDED = 32
"""Rows of an expert in bfloat16 are rounded up to a multiple of this by zeros. The library translates a kernel for
every new shape, which takes five times as long as 256 rows do, and their number is another at every step."""


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
    gate_up_M2I = x_ND.new_empty(len(order_M), gate_up_E2ID.shape[1])
    if natively(x_ND, weights_Nk, gate_up_E2ID, down_EDI):
        inputs = (x_ND, weights_Nk, order_M, counts_E, gate_up_E2ID, down_EDI)
        return native.Experts(*inputs, gate_up_M2I).forward(), gate_up_M2I
    out_ND = torch.zeros(x_ND.shape, dtype=down_EDI.dtype)
    weights_M1 = weights_Nk.flatten()[order_M, None]
    memory = _Memory(x_ND, out_ND, counts_E)
    for expert, rows, tokens_m in _segments(order_M, counts_E, weights_Nk.shape[1]):
        x_RD = memory.gathered(x_ND, tokens_m)
        gate_up_R2I = _product(x_RD, memory.narrow(gate_up_E2ID[expert]).T, gate_up_M2I[rows])
        gate_RI, up_RI = gate_up_R2I.chunk(2, -1)
        y_RD = torch.mm(F.silu(gate_RI).mul_(up_RI), memory.narrow(down_EDI[expert]).T, out=x_RD)
        out_ND.index_add_(0, tokens_m, memory.wide(y_RD[: len(tokens_m)]).mul_(weights_M1[rows]))
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
    out_ND = x_ND.new_empty(x_ND.shape, dtype=down_EDI.dtype)
    return out_ND, x_ND.new_empty(len(order_M), gate_up_E2ID.shape[1])


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
    if natively(x_ND, weights_Nk, gate_up_E2ID, down_EDI):
        inputs = (x_ND, weights_Nk, order_M, counts_E, gate_up_E2ID, down_EDI)
        return native.Experts(*inputs, gate_up_M2I).backward(grad_ND)
    dx_ND = torch.zeros(x_ND.shape, dtype=down_EDI.dtype)
    dgate_up_E2ID, ddown_EDI = (torch.empty(x.shape, dtype=x.dtype) for x in (gate_up_E2ID, down_EDI))
    weights_M1 = weights_Nk.flatten()[order_M, None]
    dweights_M = weights_Nk.new_empty(len(order_M))
    memory = _Memory(x_ND, dx_ND, counts_E)
    width = down_EDI.shape[2]
    memory_2R2I, memory_3RI = memory.more(2, 2 * width), memory.more(3, width)
    grad_ND = grad_ND.to(x_ND.dtype)
    for expert, rows, tokens_m in _segments(order_M, counts_E, weights_Nk.shape[1]):
        grad_RD = memory.gathered(grad_ND, tokens_m)
        m, R = slice(len(tokens_m)), slice(len(grad_RD))
        gate_RI, up_RI = _rounded(gate_up_M2I[rows], memory_2R2I[0, R]).chunk(2, -1)
        weights_m1 = weights_M1[rows]
        dgate_up_R2I = memory_2R2I[1, R]
        dgate_RI, dup_RI = dgate_up_R2I.chunk(2, -1)
        silu_RI, h_RI, dh_RI = memory_3RI[:, R].unbind()
        torch.ops.aten.silu.out(gate_RI, out=silu_RI)
        torch.mul(silu_RI, up_RI, out=h_RI)
        torch.mm(grad_RD, memory.narrow(down_EDI[expert]), out=dh_RI)
        # <grad, W h> = <W^T grad, h>: the output itself need not be kept.
        products_mI = torch.mul(dh_RI[m], h_RI[m], out=dup_RI[m])
        torch.sum(products_mI, -1, dtype=dweights_M.dtype, out=dweights_M[rows])
        h_RI[m].mul_(weights_m1)
        _product(grad_RD.T, h_RI, ddown_EDI[expert])
        dh_RI[m].mul_(weights_m1)
        torch.mul(dh_RI, silu_RI, out=dup_RI)
        torch.ops.aten.silu_backward.grad_input(dh_RI.mul_(up_RI), gate_RI, grad_input=dgate_RI)
        x_RD = memory.gathered(x_ND, tokens_m)
        _product(dgate_up_R2I.T, x_RD, dgate_up_E2ID[expert])
        dx_RD = torch.mm(dgate_up_R2I, memory.narrow(gate_up_E2ID[expert]), out=x_RD)
        dx_ND.index_add_(0, tokens_m, memory.wide(dx_RD[m]))
    dweights_Nk = torch.empty(weights_Nk.shape, dtype=weights_Nk.dtype)
    dweights_Nk.view(-1)[order_M] = dweights_M
    return dx_ND.to(x_ND.dtype), dweights_Nk, dgate_up_E2ID, ddown_EDI


@routed_swiglu_backward.register_fake
def _(grad_ND: Tensor, gate_up_M2I: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weights, gate_up, down = (inputs[place].new_empty(inputs[place].shape) for place in (0, 1, 4, 5))
    return x, weights, gate_up, down


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx: Any, grad_ND: Tensor, _: None) -> tuple[Tensor | None, ...]:
    dx_ND, dweights_Nk, dgate_up, ddown = routed_swiglu_backward(grad_ND, *ctx.saved_tensors)
    return dx_ND, dweights_Nk, None, None, dgate_up, ddown


routed_swiglu.register_autograd(_backward, setup_context=_keep)


def natively(x_ND: Tensor, weights_Nk: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> bool:
    """Whether our own kernels compute it: tokens in bfloat16 or float32, all else in float32 (`model/native`)."""
    wide = all(x.dtype == torch.float32 for x in (weights_Nk, gate_up_E2ID, down_EDI))
    return wide and native.takes(x_ND.dtype, x_ND.shape[1], down_EDI.shape[2])


def _segments(order_M: Tensor, counts_E: Tensor, k: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Each expert, its rows, and the tokens that they are of."""
    start, tokens_M = 0, order_M // k
    for expert, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        yield expert, rows, tokens_M[rows]
        start += count


class _Memory:
    """Room for the rows of any expert, in the type of products and in that of sums."""

    def __init__(self, x_ND: Tensor, sums_ND: Tensor, counts_E: Tensor) -> None:
        self._step = ROUNDED if x_ND.dtype == torch.bfloat16 else 1
        self._x_RD = x_ND.new_empty(self._up(int(counts_E.max())), x_ND.shape[1])
        same = x_ND.dtype == sums_ND.dtype
        self._sums_RD = self._x_RD if same else torch.empty(self._x_RD.shape, dtype=sums_ND.dtype)

    def more(self, count: int, width: int) -> Tensor:
        """[count, R, width]."""
        return self._x_RD.new_empty(count, len(self._x_RD), width)

    def gathered(self, x_ND: Tensor, tokens_m: Tensor) -> Tensor:
        """The tokens' rows, and zeros that round them up; in the same memory for every expert."""
        x_RD = self._x_RD[: self._up(len(tokens_m))]
        torch.index_select(x_ND, 0, tokens_m, out=x_RD[: len(tokens_m)])
        x_RD[len(tokens_m) :].zero_()
        return x_RD

    def narrow(self, matrix: Tensor) -> Tensor:
        return matrix.to(self._x_RD.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return x if x.dtype == self._sums_RD.dtype else self._sums_RD[: len(x)].copy_(x)

    def _up(self, count: int) -> int:
        return -(-count // self._step) * self._step


def _rounded(x_m: Tensor, memory_R: Tensor) -> Tensor:
    """The rows, and zeros that round them up to the memory's."""
    if len(x_m) == len(memory_R):
        return x_m
    memory_R[: len(x_m)].copy_(x_m)
    memory_R[len(x_m) :].zero_()
    return memory_R


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left right; its first rows go to `out`, which may be of a wider type."""
    if out.dtype == left.dtype and len(out) == len(left):
        return torch.mm(left, right, out=out)
    product = torch.mm(left, right)
    out.copy_(product[: len(out)])
    return product
