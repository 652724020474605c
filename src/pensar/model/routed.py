"""Experts in training on a CPU: gather, SwiGLU and weighted sum expert by expert, while its rows are in the cache.

Nothing of all M rows is written but what the first product gives, which is all that is kept for the backward pass
besides the inputs: with 4 experts a token a step takes a third less memory than by grouped products. As an operator of
its own it stays one step for selective recomputation and for shape propagation.
Products are in the type of the tokens, sums and gradients of matrices in the type of the matrices, which may be wider.
Shape legend: N tokens, D hidden, E experts, I expert width, k experts per token, M = N k rows sorted by expert, m rows
of one expert, R room for the rows of all, each expert's rounded up.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.model import native

ROUNDED = 32
"""Rows of an expert in bfloat16 are a multiple of this. The library translates a kernel for every new shape, which
takes five times as long as 256 rows do, and the rows of an expert are another number at every step."""


@torch.library.custom_op("pensar::routed_swiglu", mutates_args=(), device_types="cpu")
def routed_swiglu(
    x_ND: Tensor,
    weights_Nk: Tensor,
    order_M: Tensor,
    counts_E: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each token's sum of its experts' outputs times their weights [N, D]; and gate and up [R, 2I], for the backward
    pass. `order_M` is the place in `weights_Nk` of each row, `counts_E` the number of rows of each expert."""
    gate_up_R2I = _room(x_ND, order_M, gate_up_E2ID)
    if natively(x_ND, weights_Nk, gate_up_E2ID, down_EDI):
        inputs = (x_ND, weights_Nk, order_M, counts_E, gate_up_E2ID, down_EDI)
        return native.Experts(*inputs, gate_up_R2I).forward(), gate_up_R2I
    out_ND = torch.zeros_like(x_ND, dtype=down_EDI.dtype)
    weights_M1 = weights_Nk.flatten()[order_M, None]
    segments = list(_segments(order_M, counts_E, weights_Nk.shape[1], x_ND.dtype))
    gate_up_R2I[segments[-1].room.stop :].zero_()
    memory_mD, wide_mD = _memories(segments, x_ND, out_ND)
    for expert, rows, room, tokens_m in segments:
        x_mD = _gathered(x_ND, tokens_m, memory_mD, room)
        gate, up = torch.mm(x_mD, _row(gate_up_E2ID, expert, x_mD).T, out=gate_up_R2I[room]).chunk(2, -1)
        y_mD = torch.mm(F.silu(gate).mul_(up), _row(down_EDI, expert, x_mD).T, out=x_mD)[: len(tokens_m)]
        out_ND.index_add_(0, tokens_m, _wide(y_mD, wide_mD).mul_(weights_M1[rows]))
    return out_ND, gate_up_R2I


@routed_swiglu.register_fake
def _(
    x_ND: Tensor,
    weights_Nk: Tensor,
    order_M: Tensor,
    counts_E: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND, dtype=down_EDI.dtype), _room(x_ND, order_M, gate_up_E2ID)


@torch.library.custom_op("pensar::routed_swiglu_backward", mutates_args=(), device_types="cpu")
def routed_swiglu_backward(
    grad_ND: Tensor,
    gate_up_R2I: Tensor,
    x_ND: Tensor,
    weights_Nk: Tensor,
    order_M: Tensor,
    counts_E: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    by_kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, their experts' weights, and both matrices of the experts; `by_kernels` says what computed
    gate and up, which lie otherwise there."""
    if by_kernels:
        inputs = (x_ND, weights_Nk, order_M, counts_E, gate_up_E2ID, down_EDI)
        return native.Experts(*inputs, gate_up_R2I).backward(grad_ND)
    dx_ND, dgate_up_E2ID = torch.zeros_like(grad_ND), torch.empty_like(gate_up_E2ID)
    ddown_EDI = torch.empty_like(down_EDI)
    weights_M1 = weights_Nk.flatten()[order_M, None]
    dweights_M = weights_Nk.new_empty(len(order_M))
    segments = list(_segments(order_M, counts_E, weights_Nk.shape[1], x_ND.dtype))
    memory_mD, wide_mD = _memories(segments, x_ND, dx_ND)
    most, width = len(memory_mD), down_EDI.shape[2]
    memory_m2I, memory_3mI = x_ND.new_empty(most, 2 * width), x_ND.new_empty(3, most, width)
    grad_ND = grad_ND.to(x_ND.dtype)
    for expert, rows, room, tokens_m in segments:
        gate, up = gate_up_R2I[room].chunk(2, -1)
        m, size = slice(len(tokens_m)), slice(len(gate))
        weights_m1 = weights_M1[rows]
        grad_mD = _gathered(grad_ND, tokens_m, memory_mD, room)
        dgate_up_m2I = memory_m2I[size]
        dgate, dup = dgate_up_m2I.chunk(2, -1)
        silu_mI, h_mI, dh_mI = memory_3mI[:, size].unbind()
        torch.ops.aten.silu.out(gate, out=silu_mI)
        torch.mul(silu_mI, up, out=h_mI)
        torch.mm(grad_mD, _row(down_EDI, expert, x_ND), out=dh_mI)
        # <grad, W h> = <W^T grad, h>: the output itself need not be kept.
        torch.sum(torch.mul(dh_mI[m], h_mI[m], out=dup[m]), -1, dtype=dweights_M.dtype, out=dweights_M[rows])
        h_mI[m].mul_(weights_m1)
        _product(grad_mD.T, h_mI, ddown_EDI[expert])
        dh_mI[m].mul_(weights_m1)
        torch.mul(dh_mI, silu_mI, out=dup)
        torch.ops.aten.silu_backward.grad_input(dh_mI.mul_(up), gate, grad_input=dgate)
        x_mD = _gathered(x_ND, tokens_m, memory_mD, room)
        _product(dgate_up_m2I.T, x_mD, dgate_up_E2ID[expert])
        dx_mD = torch.mm(dgate_up_m2I, _row(gate_up_E2ID, expert, x_ND), out=x_mD)[m]
        dx_ND.index_add_(0, tokens_m, _wide(dx_mD, wide_mD))
    dweights_Nk = torch.empty_like(weights_Nk)
    dweights_Nk.view(-1)[order_M] = dweights_M
    return dx_ND.to(x_ND.dtype), dweights_Nk, dgate_up_E2ID, ddown_EDI


@routed_swiglu_backward.register_fake
def _(grad_ND: Tensor, gate_up_R2I: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weights, gate_up, down = (torch.empty_like(inputs[place]) for place in (0, 1, 4, 5))
    return x, weights, gate_up, down


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs)
    ctx.by_kernels = natively(*(inputs[place] for place in (0, 1, 4, 5)))


def _backward(ctx: Any, grad_ND: Tensor, _: None) -> tuple[Tensor | None, ...]:
    dx_ND, dweights_Nk, dgate_up, ddown = routed_swiglu_backward(grad_ND, *ctx.saved_tensors, ctx.by_kernels)
    return dx_ND, dweights_Nk, None, None, dgate_up, ddown


routed_swiglu.register_autograd(_backward, setup_context=_keep)


class _Segment(NamedTuple):
    expert: int
    rows: slice
    """Its rows of M."""
    room: slice
    """Their place in R, with what rounds them up."""
    tokens_m: Tensor


def _segments(order_M: Tensor, counts_E: Tensor, k: int, dtype: torch.dtype) -> Iterator[_Segment]:
    """Those of all experts in order."""
    start, place, tokens_M = 0, 0, order_M // k
    for expert, count in enumerate(counts_E.tolist()):
        rows, room = slice(start, start + count), slice(place, place + _rounded(count, dtype))
        yield _Segment(expert, rows, room, tokens_M[rows])
        start, place = rows.stop, room.stop


def natively(x_ND: Tensor, weights_Nk: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> bool:
    """Whether our own kernels compute it: tokens in bfloat16 or float32, all else in float32 (`model/native`)."""
    wide = all(x.dtype == torch.float32 for x in (weights_Nk, gate_up_E2ID, down_EDI))
    return wide and native.takes(x_ND.dtype, x_ND.shape[1], down_EDI.shape[2])


def _rounded(count: int, dtype: torch.dtype) -> int:
    return -(-count // ROUNDED) * ROUNDED if dtype == torch.bfloat16 else count


def _room(x_ND: Tensor, order_M: Tensor, gate_up_E2ID: Tensor) -> Tensor:
    """Gate and up of all rows [R, 2I], however they are spread."""
    num, width = gate_up_E2ID.shape[:2]
    most = ROUNDED if x_ND.dtype == torch.bfloat16 else native.ROUNDED
    return x_ND.new_empty(len(order_M) + num * (most - 1), width)


def _memories(segments: list[_Segment], x_ND: Tensor, out_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the tokens of any expert in the type of products and in that of sums, the same where that is one."""
    memory_mD = x_ND.new_empty(max(room.stop - room.start for _, _, room, _ in segments), x_ND.shape[1])
    return memory_mD, memory_mD if memory_mD.dtype == out_ND.dtype else torch.empty_like(
        memory_mD, dtype=out_ND.dtype
    )


def _gathered(x_ND: Tensor, tokens_m: Tensor, memory_mD: Tensor, room: slice) -> Tensor:
    """An expert's tokens, and zeros in what rounds them up."""
    x_mD = memory_mD[: room.stop - room.start]
    torch.index_select(x_ND, 0, tokens_m, out=x_mD[: len(tokens_m)])
    x_mD[len(tokens_m) :].zero_()
    return x_mD


def _row(matrices: Tensor, expert: int, like: Tensor) -> Tensor:
    return matrices[expert].to(like.dtype)


def _wide(x: Tensor, memory: Tensor) -> Tensor:
    return x if x.dtype == memory.dtype else memory[: len(x)].copy_(x)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
