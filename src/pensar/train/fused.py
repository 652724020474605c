"""Log-probabilities of chosen tokens in one compiled pass over the logits, and their gradient in another.

On a GPU the logits' way through memory costs more than the arithmetic on them: as written, softmax and gradient in
float32 move some 36 bytes for each logit, these two passes 6 with logits in bfloat16.
Shape legend: N tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def chosen_fused(logits_NV: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token's id, and the log of the softmax's denominator: [N] and [N], float32 at least."""
    logprob_N, log_z_N = _Fused.apply(logits_NV, ids_N)  # type: ignore[no-untyped-call]
    return logprob_N, log_z_N


def scores(logits_NV: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """The forward pass, as it is compiled."""
    exact_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    log_z_N = exact_NV.logsumexp(-1)
    return exact_NV.gather(1, ids_N[:, None]).squeeze(1) - log_z_N, log_z_N


def gradient(
    logits_NV: Tensor, ids_N: Tensor, log_z_N: Tensor, grad_logprob_N: Tensor, grad_log_z_N: Tensor
) -> Tensor:
    """The backward pass, as it is compiled: d log p_i / d x_j = [i = j] - p_j and d log Z / d x_j = p_j."""
    exact_NV = logits_NV.to(log_z_N.dtype)
    p_NV = (exact_NV - log_z_N[:, None]).exp()
    here_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == ids_N[:, None]
    grad_NV = p_NV * (grad_log_z_N - grad_logprob_N)[:, None] + here_NV * grad_logprob_N[:, None]
    return grad_NV.to(logits_NV.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        logprob_N, log_z_N = _compiled(scores)(logits_NV, ids_N)
        ctx.save_for_backward(logits_NV, ids_N, log_z_N)
        return logprob_N, log_z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_N: Tensor, grad_log_z_N: Tensor) -> tuple[Tensor, None]:
        saved = (tensor.detach() for tensor in ctx.saved_tensors)
        return _compiled(gradient)(*saved, grad_logprob_N, grad_log_z_N), None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled
