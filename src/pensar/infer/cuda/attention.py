"""Paged attention in Triton: heads that share keys together, long texts split among programs, sums in one order.

A tile is some consecutive tokens of a row; its program meets the pages where they lie. With tiles of one token it is
flash decoding (https://pytorch.org/blog/flash-decoding/), with longer ones the forward pass of FlashAttention-2
(arXiv 2307.08691, algorithm 1).
Shape legend: N tokens, T tiles, H query heads, K key-value heads, G query heads per key-value head, h head_dim.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pensar.infer.cuda.cache import SLAB, SlabCache
from pensar.infer.cuda.work import Work
from pensar.infer.step import PAGE

KEYS = {2: 64, 4: 16}
"""That a program meets at a time, by the bytes of a value: registers hold fewer floats."""
MAX_SPLITS = 32
LEAST_DOT = 16
"""Rows and columns that a matrix unit takes at least."""


@triton.jit(do_not_specialize=["pages", "rows", "positions", "tiles", "num_tokens", "width"])
def _attend(
    q, out, sums, peaks, first, distances, pages, rows, positions, tiles, num_tokens, width, keys_start,
    values_start, scale, K: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    SLAB_PAGES: tl.constexpr, PAGE_TOKENS: tl.constexpr,
):  # fmt: skip
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(tiles + tile)
    row = tl.load(rows + begin)
    m = tl.arange(0, M)
    token, group = (begin + m // GROUP).to(tl.int64), m % GROUP
    real = (m // GROUP < TOKENS) & (group < G) & (token < num_tokens)
    real = real & (tl.load(rows + token, mask=real, other=-1) == row)
    position = tl.load(positions + token, mask=real, other=-1)
    last = tl.max(position, 0)
    d = tl.arange(0, WIDE)
    place = (token * (K * G) + head * G + group) * SIZE
    q_md = tl.load(q + place[:, None] + d[None, :], mask=real[:, None] & (d < SIZE)[None, :], other=0.0)
    peak = tl.full([M], -1e30, tl.float32)  # finite: its difference to itself is 0 where a query meets no key
    total = tl.zeros([M], tl.float32)
    found = tl.zeros([M, WIDE], tl.float32)
    blocks = (last + BLOCK) // BLOCK
    each = (blocks + SPLITS - 1) // SPLITS
    for block in range(split * each, tl.minimum(split * each + each, blocks)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        there = at <= last
        page = tl.load(pages + row.to(tl.int64) * width + at // PAGE_TOKENS, mask=there, other=0)
        start = tl.load(distances + page // SLAB_PAGES, mask=there, other=0)
        start += ((page % SLAB_PAGES * K + head) * PAGE_TOKENS + at % PAGE_TOKENS) * SIZE
        # Whole keys begin at multiples of their size, which the compiler cannot know of loaded numbers.
        start = tl.multiple_of(start, 16 if SIZE % 16 == 0 else 1)
        whole = there[:, None] & (d < SIZE)[None, :]
        keys_nd = tl.load(first + keys_start + start[:, None] + d[None, :], mask=whole, other=0.0)
        scores = tl.dot(q_md, tl.trans(keys_nd), input_precision="ieee") * scale
        scores = tl.where(at[None, :] <= position[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - new_peak[:, None])
        fade = tl.exp(peak - new_peak)
        total = total * fade + tl.sum(weights, 1)
        values_nd = tl.load(first + values_start + start[:, None] + d[None, :], mask=whole, other=0.0)
        found = found * fade[:, None]
        found += tl.dot(weights.to(values_nd.dtype), values_nd, input_precision="ieee")
        peak = new_peak
    whole_m = real[:, None] & (d < SIZE)[None, :]
    if SPLITS == 1:
        found = found / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + place[:, None] + d[None, :], found, mask=whole_m)
    else:  # tiles of one token
        part = ((tile.to(tl.int64) * K + head) * G + group) * SPLITS + split
        tl.store(sums + part[:, None] * SIZE + d[None, :], found, mask=whole_m)
        tl.store(peaks + part * 2, peak, mask=real)
        tl.store(peaks + part * 2 + 1, total, mask=real)


@triton.jit
def _merge(
    sums, peaks, tiles, out, H: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr
):
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = (tile * H + head) * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, WIDE)
    peak, total = tl.load(peaks + part * 2), tl.load(peaks + part * 2 + 1)
    weights = tl.exp(peak - tl.max(peak, 0))
    whole = (d < SIZE)[None, :] & (part >= 0)[:, None]
    found = tl.load(sums + part[:, None] * SIZE + d[None, :], mask=whole, other=0.0)
    total = tl.sum(total * weights, 0)
    merged = tl.sum(found * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    token = tl.load(tiles + tile).to(tl.int64)
    tl.store(out + (token * H + head) * SIZE + d, merged, mask=d < SIZE)


def attention(q_NHh: Tensor, cache: SlabCache, layer: int, work: Work) -> Tensor:
    """Each query over its row's text up to its position [N, H, h]."""
    out_NHh = torch.empty_like(q_NHh)
    if work.alone_T is not None:
        splits = splits_of(len(work.alone_T) * cache.num_kv_heads, q_NHh.device)
        _launch(q_NHh, out_NHh, cache, layer, work, work.alone_T, 1, splits)
    if work.tiles_T is not None:
        _launch(q_NHh, out_NHh, cache, layer, work, work.tiles_T, work.tile_tokens, 1)
    return out_NHh


def splits_of(programs: int, device: torch.device) -> int:
    """Parts of each text, so that twice the processors of the device have something to do."""
    parts: int = triton.next_power_of_2(triton.cdiv(2 * _processors(device), programs))
    return min(MAX_SPLITS, parts)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _launch(
    q_NHh: Tensor,
    out_NHh: Tensor,
    cache: SlabCache,
    layer: int,
    work: Work,
    tiles_T: Tensor,
    tokens: int,
    splits: int,
) -> None:
    num, H, h = q_NHh.shape
    K, G = cache.num_kv_heads, H // cache.num_kv_heads
    group, wide = triton.next_power_of_2(G), max(LEAST_DOT, triton.next_power_of_2(h))
    stages = 2 if q_NHh.element_size() == 2 else 1
    sums = peaks = q_NHh
    if splits > 1:
        sums = q_NHh.new_empty(len(tiles_T), H, splits, h, dtype=torch.float32)
        peaks = q_NHh.new_empty(len(tiles_T), H, splits, 2, dtype=torch.float32)
    _attend[len(tiles_T), K, splits](
        q_NHh, out_NHh, sums, peaks, cache.first, cache.distances, work.pages_RP, work.row_N,
        work.positions_N, tiles_T, num, work.pages_RP.stride(0), cache.start(layer, 0), cache.start(layer, 1),
        h**-0.5, K, G, group, h, wide, tokens, max(LEAST_DOT, triton.next_power_of_2(tokens) * group), splits,
        KEYS[q_NHh.element_size()], SLAB, PAGE, num_warps=4, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _merge[len(tiles_T), H](sums, peaks, tiles_T, out_NHh, H, h, wide, splits)
