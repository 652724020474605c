"""The loss of hidden states through the output projection, a chunk of tokens at a time.

A chunk's gradients are computed right after its loss, so that its logits leave before those of the next come: no
product is repeated, [tokens, vocabulary] is never held, and a chunk that fits a processor's cache stays in it. With
8 layers of width 256 and 4,096 words a step on one core takes a fifth less time than with all logits at once.
Shape legend: N tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from pensar.model.qwen3 import Qwen3

LossOfLogits = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""(logits [C, V], first token, token after the last) -> loss, and sums [n] that need no gradient."""

CACHED_LOGITS = 2**22
"""Logits of a chunk on a CPU: 16 MiB in float32. 2^21 to 2^23 are equally fast, all at once takes twice the time."""
ACCELERATOR_TOKENS = 2_048
"""Tokens of a chunk on an accelerator: 1.2 GiB of logits in float32 with the official vocabulary."""


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens of a chunk where none are asked for: few enough for a cache, and enough for products at full rate."""
    return max(256, CACHED_LOGITS // vocab_size) if device_type == "cpu" else ACCELERATOR_TOKENS


def plain_head(model: Qwen3) -> Tensor | None:
    """The output projection [V, D]; None where it is spread over ranks and gives logits in its own way."""
    if "logits" in vars(model) or type(model).logits is not Qwen3.logits:
        return None
    weight: Tensor = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    return weight if type(weight) in (nn.Parameter, Tensor, FakeTensor) else None


def head_loss(
    states_ND: Tensor, head_VD: Tensor, loss_of: LossOfLogits, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """The sums of `loss_of` over chunks of `chunk` tokens; None for the second where there is no token."""
    if len(states_ND) == 0:
        return states_ND.sum() * 0.0, None
    learns = torch.is_grad_enabled() and (states_ND.requires_grad or head_VD.requires_grad)
    loss, sums = _HeadLoss.apply(states_ND, head_VD, loss_of, chunk, learns)  # type: ignore[no-untyped-call]
    return loss, sums


def chosen(logits_NV: Tensor, ids_N: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
    """Log-probability of each token's id, and the log of the softmax's denominator: [N] and [N].

    The library's softmax is one pass over a row that is in the cache, four times as fast on a CPU as its exponential
    alone, and its result is all that the gradient needs. On a CPU `overwrite` puts it, and then the gradient, into the
    memory of the logits, which the caller must not look at again.
    """
    logprob_N, log_z_N = _Chosen.apply(logits_NV, ids_N, overwrite)  # type: ignore[no-untyped-call]
    return logprob_N, log_z_N


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_N: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
        top_N = logits_NV.amax(-1)
        picked_N = logits_NV.gather(1, ids_N[:, None]).squeeze(1)
        memory_NV = logits_NV.detach() if overwrite and logits_NV.device.type == "cpu" else None
        p_NV = torch.softmax(logits_NV.detach(), -1, out=memory_NV)
        log_z_N = top_N - p_NV.amax(-1).log()  # the largest is at least 1 / V
        ctx.save_for_backward(ids_N, p_NV)
        return picked_N - log_z_N, log_z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_N: Tensor, grad_log_z_N: Tensor) -> tuple[Tensor, None, None]:
        ids_N, p_NV = ctx.saved_tensors
        grad_NV = p_NV.mul_((grad_log_z_N - grad_logprob_N)[:, None])
        grad_NV.scatter_add_(1, ids_N[:, None], grad_logprob_N[:, None])
        return grad_NV, None, None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_ND: Tensor, head_VD: Tensor, loss_of: LossOfLogits, chunk: int, learns: bool
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(states_ND, head_VD) if learns else None
        scores = _Scores(head_VD, min(chunk, len(states_ND)))
        total: Tensor | None = None
        counted: Tensor | None = None
        for start in range(0, len(states_ND), chunk):
            stop = min(start + chunk, len(states_ND))
            logits_CV = scores.of(states_ND[start:stop])
            with torch.set_grad_enabled(learns):
                loss, sums = loss_of(logits_CV.requires_grad_(learns), start, stop)
            if gradients is not None:
                gradients.add(torch.autograd.grad(loss, logits_CV)[0], start, stop)
            total = loss.detach() if total is None else total + loss.detach()
            counted = sums if counted is None else counted + sums
        assert total is not None
        assert counted is not None
        if gradients is not None:
            ctx.save_for_backward(*gradients.whole())
        ctx.mark_non_differentiable(counted)
        return total, counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        if grad.device.type == "cpu" and grad.item() == 1.0:
            return *(gradient if needed else None for gradient, needed in wanted), None, None, None
        return *(gradient * grad if needed else None for gradient, needed in wanted), None, None, None


class _Scores:
    """Logits of chunk after chunk, in the memory of the first where that is as good as memory of their own."""

    def __init__(self, head_VD: Tensor, chunk: int) -> None:
        self._head, self._chunk = head_VD, chunk
        self._memory: Tensor | None = None

    def of(self, states_CD: Tensor) -> Tensor:
        if states_CD.dtype != self._head.dtype or _autocast(states_CD):
            return nn.functional.linear(states_CD, self._head)
        if self._memory is None:
            self._memory = states_CD.new_empty(self._chunk, len(self._head))
        return torch.mm(states_CD, self._head.mT, out=self._memory[: len(states_CD)].detach())


class _Gradients:
    """Of states and head, filled chunk by chunk; the head's is summed at least in float32."""

    def __init__(self, states_ND: Tensor, head_VD: Tensor) -> None:
        self._states, self._head = states_ND, head_VD
        self._states_ND = torch.empty_like(states_ND)
        self._head_VD: Tensor | None = None

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Both in the types of what they are gradients of; None for that of a head that does not learn."""
        return self._states_ND, None if self._head_VD is None else self._head_VD.to(self._head.dtype)

    def add(self, logits_CV: Tensor, start: int, stop: int) -> None:
        states_CD = self._states_ND[start:stop]
        plain = logits_CV.dtype == states_CD.dtype == self._head.dtype and not _autocast(logits_CV)
        if plain:
            torch.mm(logits_CV, self._head, out=states_CD)
        else:
            states_CD.copy_(logits_CV @ self._head)
        if not self._head.requires_grad:
            return
        states_CD = self._states[start:stop]
        if self._head_VD is None:
            wide = torch.promote_types(self._head.dtype, torch.float32)
            self._head_VD = (logits_CV.mT @ states_CD).to(wide)
        elif plain and self._head_VD.dtype == self._head.dtype:
            self._head_VD.addmm_(logits_CV.mT, states_CD)
        else:
            self._head_VD += logits_CV.mT @ states_CD


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
