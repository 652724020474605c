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
        chunks = _Chunks(states_ND, head_VD, min(chunk, len(states_ND)))
        total: Tensor | None = None
        counted: Tensor | None = None
        for start in range(0, len(states_ND), chunk):
            stop = min(start + chunk, len(states_ND))
            logits_CV = chunks.logits(start, stop)
            with torch.set_grad_enabled(learns):
                loss, sums = loss_of(logits_CV.requires_grad_(learns), start, stop)
            if learns:
                chunks.learn(torch.autograd.grad(loss, logits_CV)[0], start, stop)
            total = loss.detach() if total is None else total + loss.detach()
            counted = sums if counted is None else counted + sums
        assert total is not None
        assert counted is not None
        if learns:
            ctx.save_for_backward(*chunks.gradients())
        ctx.mark_non_differentiable(counted)
        return total, counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        if grad.device.type == "cpu" and grad.item() == 1.0:
            return *(gradient if needed else None for gradient, needed in wanted), None, None, None
        return *(gradient * grad if needed else None for gradient, needed in wanted), None, None, None


class _Chunks:
    """Logits of chunk after chunk, and from theirs the gradients of states and head, the head's summed at least in
    float32.

    On a CPU, or where nothing is cast, all chunks are computed in the memory of the first. A CPU that casts does so
    with states and head once and not in every chunk, and gives logits in float32 for the softmax.
    """

    def __init__(self, states_ND: Tensor, head_VD: Tensor, chunk: int) -> None:
        self._wanted_head, self._head_type = head_VD.requires_grad, head_VD.dtype
        self._states_grad_ND = torch.empty_like(states_ND)
        self._head_grad_VD: Tensor | None = None
        cast = _autocast(states_ND) and states_ND.dtype == torch.float32
        on_cpu = states_ND.device.type == "cpu"
        self._shared = states_ND.dtype == head_VD.dtype and (on_cpu or not _autocast(states_ND))
        if self._shared:
            self._logits_CV = states_ND.new_empty(chunk, len(head_VD))
            if cast:
                narrow = torch.get_autocast_dtype("cpu")
                states_ND, head_VD = states_ND.to(narrow), head_VD.to(narrow)
            same = states_ND.dtype == self._logits_CV.dtype
            self._product_CV = self._logits_CV if same else states_ND.new_empty(self._logits_CV.shape)
        self._states_ND, self._head_VD = states_ND, head_VD

    def logits(self, start: int, stop: int) -> Tensor:
        states_CD = self._states_ND[start:stop]
        if not self._shared:
            return nn.functional.linear(states_CD, self._head_VD)
        product_CV = self._product_CV[: stop - start].detach()
        return _copied(torch.mm(states_CD, self._head_VD.mT, out=product_CV), self._logits_CV)

    def learn(self, grad_CV: Tensor, start: int, stop: int) -> None:
        """`grad_CV` is the gradient of the logits of this chunk."""
        if self._shared:
            grad_CV = _copied(grad_CV, self._product_CV)
        states_CD, out_CD = self._states_ND[start:stop], self._states_grad_ND[start:stop]
        plain = self._shared and out_CD.dtype == states_CD.dtype
        if plain:
            torch.mm(grad_CV, self._head_VD, out=out_CD)
        else:
            out_CD.copy_(grad_CV @ self._head_VD)
        if not self._wanted_head:
            return
        if self._head_grad_VD is None:
            wide = torch.promote_types(self._head_type, torch.float32)
            self._head_grad_VD = (grad_CV.mT @ states_CD).to(wide)
        elif plain and self._head_grad_VD.dtype == states_CD.dtype:
            self._head_grad_VD.addmm_(grad_CV.mT, states_CD)
        else:
            self._head_grad_VD += grad_CV.mT @ states_CD

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Of states and head in their types; None for that of a head that does not learn."""
        head_VD = self._head_grad_VD
        return self._states_grad_ND, None if head_VD is None else head_VD.to(self._head_type)


def _copied(x: Tensor, memory: Tensor) -> Tensor:
    """`x` in the type and the memory of another; itself where that is its own type."""
    return x if x.dtype == memory.dtype else memory[: len(x)].detach().copy_(x)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
