"""Naive twins: what each kernel computes, in plain torch; also for machines without Triton.

Shape legend: N tokens, D hidden or inputs, O outputs, I width, H query heads, K key-value heads, A all of them,
h head_dim, E experts, M rows sorted by expert, T tokens of a text.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.infer.cuda.cache import SlabCache
from pensar.infer.cuda.work import Work
from pensar.infer.step import PAGE


def add_norm(x_ND: Tensor, stream_ND: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    stream_ND = x_ND if stream_ND is None else stream_ND + x_ND
    return rms_norm(stream_ND, weight_D, eps), stream_ND


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normed.to(x.dtype) * weight


def heads(
    qkv_NO: Tensor, norms_2h: Tensor, angles_Lh: Tensor, eps: float, cache: SlabCache, layer: int, work: Work
) -> Tensor:
    K, h = cache.num_kv_heads, cache.head_dim
    qkv_NAh = qkv_NO.view(len(qkv_NO), -1, h)
    q_NHh, k_NKh, v_NKh = qkv_NAh.split((qkv_NAh.shape[1] - 2 * K, K, K), 1)
    position_N = work.positions_N.clamp(min=0).long()
    cosine_N1h, sine_N1h = angles_Lh[position_N][:, None].chunk(2, -1)
    q_NHh = _turned(rms_norm(q_NHh, norms_2h[0], eps), cosine_N1h, sine_N1h)
    k_NKh = _turned(rms_norm(k_NKh, norms_2h[1], eps), cosine_N1h, sine_N1h)
    for token, (position, row) in enumerate(zip(work.positions_N.tolist(), work.row_N.tolist(), strict=True)):
        if position >= 0:
            page = int(work.pages_RP[row, position // PAGE])
            cache.put(layer, 0, page, position % PAGE, k_NKh[token])
            cache.put(layer, 1, page, position % PAGE, v_NKh[token])
    return q_NHh


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.to(_wide(x)).chunk(2, -1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1).to(x.dtype)


def attention(q_NHh: Tensor, cache: SlabCache, layer: int, work: Work) -> Tensor:
    out_NHh = torch.zeros_like(q_NHh)
    group = q_NHh.shape[1] // cache.num_kv_heads
    for token, (position, row) in enumerate(zip(work.positions_N.tolist(), work.row_N.tolist(), strict=True)):
        if position < 0:
            continue
        pages = work.pages_RP[row, : position // PAGE + 1]
        for head in range(q_NHh.shape[1]):
            keys_Th, values_Th = (
                cache.held(layer, which, pages)[head // group, : position + 1].to(_wide(q_NHh))
                for which in (0, 1)
            )
            scores_T = keys_Th @ q_NHh[token, head].to(_wide(q_NHh)) * cache.head_dim**-0.5
            out_NHh[token, head] = scores_T.softmax(0) @ values_Th
    return out_NHh


def swiglu(gate_up_N2I: Tensor) -> Tensor:
    gate_NI, up_NI = gate_up_N2I.chunk(2, -1)
    return F.silu(gate_NI) * up_NI


def row_product(
    x_1D: Tensor,
    weight_OD: Tensor,
    scales_O: Tensor | None = None,
    *,
    gain_D: Tensor | None = None,
    eps: float = 0.0,
    stream_1O: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    wide = _wide(x_1D)
    x, weight = x_1D.to(wide), weight_OD.to(wide)
    if gain_D is not None:
        x = rms_norm(x, gain_D.to(wide), eps)
    if scales_O is not None:
        weight = weight * scales_O[:, None]
    out = x @ weight.T
    if gated:
        out = swiglu(out)
    if stream_1O is not None:
        out = out + stream_1O.to(wide)
    return out.to(x_1D.dtype)


def quantize(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """In float8_e4m3, and the scale of each row [..., 1] in float32."""
    top = torch.finfo(torch.float8_e4m3fn).max
    scale_N1 = (x_ND.float().abs().amax(-1, keepdim=True) / top).clamp(min=1e-12)
    return (x_ND.float() / scale_N1).to(torch.float8_e4m3fn), scale_N1


def grouped_product(
    x_ND: Tensor,
    source_M: Tensor | None,
    counts_E: Tensor,
    weight_EOD: Tensor,
    scales_EO: Tensor | None = None,
    *,
    gated: bool = False,
) -> Tensor:
    wide = _wide(x_ND)
    rows = (x_ND if source_M is None else x_ND[source_M]).to(wide).split(counts_E.tolist())
    weights = weight_EOD.to(wide) if scales_EO is None else weight_EOD.to(wide) * scales_EO[..., None]
    out_MO = torch.cat([row @ weight.T for row, weight in zip(rows, weights, strict=True)])
    return (swiglu(out_MO) if gated else out_MO).to(x_ND.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)
