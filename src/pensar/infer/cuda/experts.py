"""Products of rows that are sorted by expert, each with its expert's matrix, in Triton; nothing waits for the counts.

Shape legend: N tokens, E experts, k experts per token, M = N k rows, D inputs, O outputs, B blocks of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from pensar.model import hardware
from pensar.model.moe import grouped

MANY = 32
"""Rows of an expert on average from which the library's product is taken where it has one."""


@triton.jit
def _grouped(
    x, source, weight, scales, out, table, inputs, outputs, GATHERED: tl.constexpr, SCALED: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(0) * 3
    expert = tl.load(entry).to(tl.int64)
    if expert >= 0:
        row = tl.load(entry + 1) + tl.arange(0, ROWS)
        real = row < tl.load(entry + 2)
        from_row = row.to(tl.int64)
        if GATHERED:
            from_row = tl.load(source + row, mask=real, other=0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        wide = column < outputs
        height = 2 * outputs if GATED else outputs
        begin = weight + (expert * height + column)[None, :] * inputs
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        up_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, inputs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < inputs
            both = inside[:, None] & wide[None, :]
            x_md = tl.load(
                x + from_row[:, None] * inputs + at[None, :], mask=real[:, None] & inside[None, :], other=0.0
            )
            w_do = tl.load(begin + at[:, None], mask=both, other=0.0).to(x_md.dtype)
            sums += tl.dot(x_md, w_do, input_precision="ieee")
            if GATED:
                up_do = tl.load(begin + outputs.to(tl.int64) * inputs + at[:, None], mask=both, other=0.0)
                up_sums += tl.dot(x_md, up_do.to(x_md.dtype), input_precision="ieee")
        if SCALED:
            scale = scales + expert * height + column
            sums *= tl.load(scale, mask=wide, other=0.0)[None, :]
            if GATED:
                up_sums *= tl.load(scale + outputs, mask=wide, other=0.0)[None, :]
        if GATED:
            sums = sums / (1 + tl.exp(-sums)) * up_sums
        place = out + row.to(tl.int64)[:, None] * outputs + column[None, :]
        tl.store(place, sums, mask=real[:, None] & wide[None, :])


def grouped_product(
    x_ND: Tensor,
    source_M: Tensor | None,
    counts_E: Tensor,
    weight_EOD: Tensor,
    scales_EO: Tensor | None = None,
    *,
    gated: bool = False,
) -> Tensor:
    """Row m is its expert's matrix times row source_M[m] of x (or row m), or SwiGLU of that (`gated`): [M, O]."""
    num = len(x_ND) if source_M is None else len(source_M)
    experts, outputs, inputs = weight_EOD.shape
    if num >= MANY * experts and scales_EO is None and _library_has(x_ND, outputs):
        out = grouped(x_ND if source_M is None else x_ND[source_M], weight_EOD, counts_E)
        if not gated:
            return out
        gate, up = out.chunk(2, -1)
        return F.silu(gate) * up
    outputs = outputs // 2 if gated else outputs
    rows, columns, block = (64 if num >= MANY * experts else 16), 128 // x_ND.element_size(), 64
    table_B3 = blocks_of(counts_E, num, rows)
    out_MO = x_ND.new_empty(num, outputs)
    _grouped[len(table_B3), triton.cdiv(outputs, columns)](
        x_ND, source_M, weight_EOD, scales_EO, out_MO, table_B3, inputs, outputs, source_M is not None,
        scales_EO is not None, gated, rows, columns, block, num_warps=4,
    )  # fmt: skip
    return out_MO


def blocks_of(counts_E: Tensor, num: int, rows: int) -> Tensor:
    """Of each block of at most `rows` rows of one expert: the expert, the block's first row, and the row after the
    expert's last [B, 3]; expert -1 where there are fewer blocks than there could be."""
    blocks_E = (counts_E + rows - 1) // rows
    ends_E, stops_E = blocks_E.cumsum(0), counts_E.cumsum(0)
    most = num // rows + min(len(counts_E), num)
    block_B = torch.arange(most, device=counts_E.device)
    expert_B = torch.searchsorted(ends_E, block_B, right=True)
    known_B = expert_B.clamp(max=len(counts_E) - 1)
    before_B = block_B - (ends_E - blocks_E)[known_B]
    first_B = (stops_E - counts_E)[known_B] + before_B * rows
    expert_B = torch.where(expert_B < len(counts_E), expert_B, -1)
    return torch.stack((expert_B, first_B, stops_E[known_B]), 1).int()


def _library_has(x_ND: Tensor, outputs: int) -> bool:
    return (
        x_ND.dtype == torch.bfloat16
        and hardware.capability(x_ND.device) >= hardware.AMPERE
        and x_ND.shape[1] % 8 == outputs % 8 == 0
    )
