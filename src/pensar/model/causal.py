"""Causal attention for training on a CPU: blocks of queries against the keys before them, by batched products.

The library's fused kernel for CPUs multiplies at a quarter of the rate of its matrix products; products of whole blocks
run at full rate, and the blocks above the diagonal are left out. As an operator of its own it stays one step for
compilers, for selective recomputation and for shape propagation.
Shape legend: B batch, T tokens, H query heads, K key-value heads, G = H / K, h head_dim, S = T G, b block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pensar.model import native

BLOCK = 64
"""Queries at a time: of 64, 128 and 256 the fastest at 512 tokens, beyond them by a few percent."""


def natively(q_BTHh: Tensor, v_BTKh: Tensor) -> bool:
    """Whether our own kernels compute it, all products in the type of the values (`model/native`)."""
    known = q_BTHh.dtype in (v_BTKh.dtype, torch.float32) and q_BTHh.device.type == "cpu"
    return known and native.takes(v_BTKh.dtype, q_BTHh.shape[-1])


@torch.library.custom_op("pensar::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
    """Softmax attention [B, T, H, h] of each query over the keys up to its own, scores scaled by 1 / sqrt(h).

    The softmax is in the type of queries and keys, products and output in that of the values, which may be narrower;
    scores are then in either. Nothing but inputs and output is kept for the backward pass; a block takes
    [B K, b G, T] meanwhile.
    """
    if natively(q_BTHh, v_BTKh):
        return native.Attention(q_BTHh, k_BTKh, v_BTKh).forward()
    q_, k_, v_ = _by_group(q_BTHh, k_BTKh), _by_head(k_BTKh), _by_head(v_BTKh)
    out_ = torch.empty_like(q_, dtype=v_.dtype)
    for rows, seen, p in _blocks(q_, k_):
        torch.bmm(p.to(v_.dtype), v_[:, :seen], out=out_[:, rows])
    return _back(out_, q_BTHh.shape)


@causal_attention.register_fake
def _(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
    return v_BTKh.new_empty(q_BTHh.shape)


@torch.library.custom_op("pensar::causal_attention_backward", mutates_args=(), device_types="cpu")
def causal_attention_backward(
    grad_BTHh: Tensor, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, out_BTHh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; the probabilities are computed again."""
    if natively(q_BTHh, v_BTKh):
        dq, dk, dv = native.Attention(q_BTHh, k_BTKh, v_BTKh).backward(out_BTHh, grad_BTHh)
        return dq.to(q_BTHh.dtype), dk.to(k_BTKh.dtype), dv.to(v_BTKh.dtype)
    q_, k_, v_ = _by_group(q_BTHh, k_BTKh), _by_head(k_BTKh), _by_head(v_BTKh)
    grad_, scale = _by_group(grad_BTHh, k_BTKh), q_BTHh.shape[-1] ** -0.5
    delta_ = _by_group((grad_BTHh * out_BTHh).sum(-1, keepdim=True, dtype=q_.dtype), k_BTKh)
    dq_, dk_, dv_ = (
        torch.empty_like(q_, dtype=v_.dtype),
        torch.zeros_like(k_),
        torch.zeros_like(v_, dtype=k_.dtype),
    )
    memory = _memory(q_, k_)
    narrow_q_, narrow_k_ = q_.to(v_.dtype), k_.to(v_.dtype)
    for rows, seen, p in _blocks(q_, k_):
        _add_product(dv_[:, :seen], p.to(v_.dtype).mT, grad_[:, rows])
        ds = _product(grad_[:, rows], v_[:, :seen].mT, memory[: p.numel()].view_as(p))
        ds = ds.sub_(delta_[:, rows]).mul_(p).to(v_.dtype)
        dq = dq_[:, rows]
        torch.baddbmm(dq, ds, narrow_k_[:, :seen], beta=0, alpha=scale, out=dq)
        _add_product(dk_[:, :seen], ds.mT, narrow_q_[:, rows], scale)
    dq, dk, dv = _back(dq_, q_BTHh.shape), _back(dk_, k_BTKh.shape), _back(dv_, v_BTKh.shape)
    return dq.to(q_.dtype), dk, dv.to(v_.dtype)


@causal_attention_backward.register_fake
def _(
    grad_BTHh: Tensor, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, out_BTHh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.shape) for x in (q_BTHh, k_BTKh, v_BTKh))
    return q, k, v


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad_BTHh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = causal_attention_backward(grad_BTHh, *ctx.saved_tensors)
    return grads


causal_attention.register_autograd(_backward, setup_context=_keep)


def _blocks(q_: Tensor, k_: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Of each block of queries [B K, S, h]: its rows, the number of keys its last one sees, and its probabilities,
    in the memory of those of the block before."""
    group, scale, memory = q_.shape[1] // k_.shape[1], q_.shape[-1] ** -0.5, _memory(q_, k_)
    future = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q_.dtype).triu(1).repeat_interleave(group, 0)
    for start in range(0, k_.shape[1], BLOCK):
        seen = min(start + BLOCK, k_.shape[1])
        rows, width = slice(start * group, seen * group), seen - start
        p = memory[: len(q_) * width * group * seen].view(len(q_), width * group, seen)
        torch.baddbmm(p, q_[:, rows], k_[:, :seen].mT, beta=0, alpha=scale, out=p)
        p[:, :, start:] += future[: width * group, :width]
        yield rows, seen, torch.softmax(p, -1, out=p)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left right into `out`, which may be of a wider type."""
    return torch.bmm(left, right, out=out) if out.dtype == left.dtype else out.copy_(torch.bmm(left, right))


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """total += scale left right, summed in the type of `total`, which may be wider."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=scale)
    else:
        total.add_(torch.bmm(left, right), alpha=scale)


def _memory(q_: Tensor, k_: Tensor) -> Tensor:
    """Room for the scores of the largest block."""
    length = k_.shape[1]
    return q_.new_empty(len(q_) * min(BLOCK, length) * (q_.shape[1] // length) * length)


def _by_group(x_BTHh: Tensor, k_BTKh: Tensor) -> Tensor:
    """The queries of a key-value head side by side: [B K, T G, h]."""
    batch, length, heads, size = x_BTHh.shape
    kv_heads = k_BTKh.shape[2]
    by_head = x_BTHh.view(batch, length, kv_heads, heads // kv_heads, size).transpose(1, 2)
    return by_head.reshape(batch * kv_heads, length * (heads // kv_heads), size)


def _by_head(x_BTKh: Tensor) -> Tensor:
    return x_BTKh.transpose(1, 2).flatten(0, 1)


def _back(x_: Tensor, shape: torch.Size) -> Tensor:
    """[B K, T G, h] -> [B, T, H, h], in memory of its own."""
    batch, length, heads, size = shape
    kv_heads = x_.shape[0] // batch
    by_token = x_.view(batch, kv_heads, length, heads // kv_heads, size).transpose(1, 2)
    return by_token.reshape(shape).contiguous()
