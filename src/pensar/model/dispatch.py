"""Rows of tokens sent to their experts and summed on the way back, without sums of unknown order on an accelerator.

The library's gather adds up its gradients by a sort or by atomic additions, and so does its scatter in the forward
pass: slow, or different from run to run. Both are permutations of [N, k] with a sum over k on one side, and each is the
other's gradient.
Shape legend: N tokens, k experts per token, M = N k rows sorted by expert, D hidden.
"""

from typing import Any

import torch
from torch import Tensor


def sent(x_ND: Tensor, order_M: Tensor, k: int) -> Tensor:
    """[M, D]: the token of each row; `order_M` sorts the [N, k] assignments by expert."""
    out_MD: Tensor = _Sent.apply(x_ND, order_M, inverse_of(order_M), k)  # type: ignore[no-untyped-call]
    return out_MD


def returned(out_MD: Tensor, order_M: Tensor, k: int) -> Tensor:
    """[N, D]: the sum of each token's k rows, in float32 within."""
    x_ND: Tensor = _Returned.apply(out_MD, order_M, inverse_of(order_M), k)  # type: ignore[no-untyped-call]
    return x_ND


def inverse_of(order_M: Tensor) -> Tensor:
    """Where each of the [N, k] assignments went."""
    rows_M = torch.arange(len(order_M), device=order_M.device)
    return torch.empty_like(order_M).scatter_(0, order_M, rows_M)


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, inverse_M: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse_M)
        ctx.k = k
        return x_ND[order_M // k]

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        return _summed(grad_MD, ctx.saved_tensors[0], ctx.k), None, None, None


class _Returned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_MD: Tensor, order_M: Tensor, inverse_M: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_M)
        ctx.k = k
        return _summed(out_MD, inverse_M, k)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_ND[ctx.saved_tensors[0] // ctx.k], None, None, None


def _summed(rows_MD: Tensor, inverse_M: Tensor, k: int) -> Tensor:
    return rows_MD[inverse_M].view(-1, k, rows_MD.shape[-1]).sum(1)
