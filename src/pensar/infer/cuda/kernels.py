"""Triton kernels of a layer, attention and experts apart: norms, rotated heads, SwiGLU, products of one row.

Every sum is in float32 and has one order. Kernels round to the module's type where the module does, but for
`row_product`, which rounds once. The naive twin of each is in `twins.py`.
Shape legend: N tokens, D hidden or inputs, O outputs, I width, H query heads, K key-value heads, h head_dim,
P pages of the longest row, R rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pensar.infer.cuda.attention import attention
from pensar.infer.cuda.cache import SLAB, SlabCache
from pensar.infer.cuda.experts import grouped_product
from pensar.infer.cuda.work import Work
from pensar.infer.step import PAGE

__all__ = ["add_norm", "attention", "grouped_product", "heads", "quantize", "row_product", "swiglu"]


@triton.jit
def _add_norm(x, stream, weight, out, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    there = at < size
    values = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(stream + row + at, mask=there, other=0.0).to(tl.float32)
        values = values.to(out.dtype.element_ty).to(tl.float32)
        tl.store(stream + row + at, values, mask=there)
    scale = tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    normed = (values * scale).to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row + at, normed * gain, mask=there)


def add_norm(x_ND: Tensor, stream_ND: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of the stream with x added to it, and that stream, which is written where it was; x itself is the stream
    where there is none yet."""
    size, out_ND = x_ND.shape[1], torch.empty_like(x_ND)
    into = x_ND if stream_ND is None else stream_ND
    _add_norm[len(x_ND),](
        x_ND, into, weight_D, out_ND, size, eps, stream_ND is not None, triton.next_power_of_2(size)
    )
    return out_ND, into


@triton.jit(do_not_specialize=["positions", "rows", "pages", "width"])
def _heads(
    qkv, norms, angles, positions, rows, pages, out, first, distances, width, keys_start, values_start, eps,
    H: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, SLAB_PAGES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token)
    half: tl.constexpr = SIZE // 2
    at = tl.arange(0, HALF)
    there = at < half
    source = qkv + token * ((H + 2 * K) * SIZE) + head * SIZE
    left = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
    right = tl.load(source + half + at, mask=there, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    if head < H + K:
        scale = tl.rsqrt((tl.sum(left * left, 0) + tl.sum(right * right, 0)) / SIZE + eps)
        gain = norms + tl.where(head < H, 0, SIZE)
        left_gain = tl.load(gain + at, mask=there, other=0.0).to(tl.float32)
        right_gain = tl.load(gain + half + at, mask=there, other=0.0).to(tl.float32)
        left = (left * scale).to(kind).to(tl.float32) * left_gain
        right = (right * scale).to(kind).to(tl.float32) * right_gain
        left, right = left.to(kind).to(tl.float32), right.to(kind).to(tl.float32)
        turns = angles + tl.maximum(position, 0).to(tl.int64) * SIZE
        cosine = tl.load(turns + at, mask=there, other=0.0).to(tl.float32)
        sine = tl.load(turns + half + at, mask=there, other=0.0).to(tl.float32)
        left, right = left * cosine - right * sine, right * cosine + left * sine
    if head < H:
        target = out + (token * H + head) * SIZE
        tl.store(target + at, left, mask=there)
        tl.store(target + half + at, right, mask=there)
    elif position >= 0:
        page = tl.load(pages + tl.load(rows + token).to(tl.int64) * width + position // PAGE_TOKENS)
        kv_head = tl.where(head < H + K, head - H, head - H - K)
        start = tl.where(head < H + K, keys_start, values_start)
        start += ((page % SLAB_PAGES * K + kv_head) * PAGE_TOKENS + position % PAGE_TOKENS) * SIZE
        target = first + tl.load(distances + page // SLAB_PAGES) + start
        tl.store(target + at, left, mask=there)
        tl.store(target + half + at, right, mask=there)


def heads(
    qkv_NO: Tensor, norms_2h: Tensor, angles_Lh: Tensor, eps: float, cache: SlabCache, layer: int, work: Work
) -> Tensor:
    """Normalised and rotated queries [N, H, h]; the keys, treated alike, and the values go to their pages.

    `angles_Lh` has a position's cosines and then its sines, `norms_2h` the gains of queries and of keys.
    """
    K, h = cache.num_kv_heads, cache.head_dim
    H = qkv_NO.shape[1] // h - 2 * K
    out_NHh = qkv_NO.new_empty(len(qkv_NO), H, h)
    _heads[len(qkv_NO), H + 2 * K](
        qkv_NO, norms_2h, angles_Lh, work.positions_N, work.row_N, work.pages_RP, out_NHh, cache.first,
        cache.distances, work.pages_RP.stride(0), cache.start(layer, 0), cache.start(layer, 1), eps, H, K, h,
        triton.next_power_of_2(h // 2), SLAB, PAGE, num_warps=1,
    )  # fmt: skip
    return out_NHh


@triton.jit
def _swiglu(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=there, other=0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + at, silu * up, mask=there)


def swiglu(gate_up_N2I: Tensor) -> Tensor:
    """silu(gate) * up [N, I] of gates and ups side by side."""
    num, width = gate_up_N2I.shape
    out_NI = gate_up_N2I.new_empty(num, width // 2)
    block = min(1_024, triton.next_power_of_2(width // 2))
    _swiglu[num, triton.cdiv(width // 2, block)](gate_up_N2I, out_NI, width // 2, block)
    return out_NI


@triton.jit
def _row_product(
    x, weight, scales, gain, stream, out, inputs, outputs, eps, SCALED: tl.constexpr, NORMED: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < outputs
    begin = weight + row.to(tl.int64)[:, None] * inputs
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    up_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < inputs
        both = there[:, None] & inside[None, :]
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            squares += values * values
            values *= tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
        sums += tl.load(begin + at[None, :], mask=both, other=0.0).to(tl.float32) * values[None, :]
        if GATED:
            ups = begin + outputs.to(tl.int64) * inputs + at[None, :]
            up_sums += tl.load(ups, mask=both, other=0.0).to(tl.float32) * values[None, :]
    found, up = tl.sum(sums, 1), tl.sum(up_sums, 1)
    if SCALED:
        found *= tl.load(scales + row, mask=there, other=0.0)
        if GATED:
            up *= tl.load(scales + outputs + row, mask=there, other=0.0)
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, 0) / inputs + eps)
        found, up = found * scale, up * scale
    if GATED:
        found = found / (1 + tl.exp(-found)) * up
    if ADD:
        found += tl.load(stream + row, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row, found, mask=there)


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
    """W x of one row, which reads W once: of the normalised x with a gain, as SwiGLU of gates and ups that lie one
    after the other in W (`gated`), added to a stream, W in 8 bits with a scale a row; any of these together."""
    outputs, inputs = weight_OD.shape
    outputs = outputs // 2 if gated else outputs
    out_1O = x_1D.new_empty(1, outputs)
    block = min(1_024 // (2 if gated else 1), triton.next_power_of_2(inputs))
    rows = 4
    _row_product[triton.cdiv(outputs, rows),](
        x_1D, weight_OD, scales_O, gain_D, stream_1O, out_1O, inputs, outputs, eps, scales_O is not None,
        gain_D is not None, gated, stream_1O is not None, rows, block,
    )  # fmt: skip
    return out_1O


@triton.jit
def _quantize(x, out, scales, size, top, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    values = tl.load(x + row * size + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / top, 1e-12)
    tl.store(scales + row, scale)
    tl.store(out + row * size + at, (values / scale).to(out.dtype.element_ty), mask=there)


def quantize(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """x in float8_e4m3 and the scale [N, 1] of each row, so that its largest value is the type's."""
    num, size = x_ND.shape
    out_ND = torch.empty_like(x_ND, dtype=torch.float8_e4m3fn)
    scales_N1 = x_ND.new_empty(num, 1, dtype=torch.float32)
    top = torch.finfo(torch.float8_e4m3fn).max
    _quantize[num,](x_ND, out_ND, scales_N1, size, top, triton.next_power_of_2(size))
    return out_ND, scales_N1
