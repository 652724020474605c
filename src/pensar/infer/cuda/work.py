"""Work: which tokens a pass computes and where their texts lie, as tensors that kernels read.

Shape legend: N tokens of all rows, R rows, P pages, T tiles of queries.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pensar.infer.request import Ints
from pensar.infer.step import StepBatch

FEW = 16
"""New tokens of a row up to which each is attended for by itself: a token, guesses, the end of a forced sentence."""
TILE_ROWS = {2: 64, 4: 16}
"""Queries of a tile in one kernel program, heads counted, by the bytes of a value: registers hold fewer floats."""


@dataclass(frozen=True, slots=True)
class Work:
    """All int32 on the device; a token at position -1 is padding: it writes nothing, and its output is zeros."""

    positions_N: Tensor
    row_N: Tensor
    pages_RP: Tensor
    """Its stride is what a row takes: static inputs are wider than any batch."""
    alone_T: Tensor | None
    """Tokens that are attended for one by one, their texts split among programs."""
    tiles_T: Tensor | None
    """First tokens of tiles of consecutive ones; a tile ends with `tile_tokens`, its row or the batch."""
    tile_tokens: int = 1


def work_of(batch: StepBatch, tile_tokens: int, device: torch.device) -> tuple[Tensor, Work]:
    """Tokens and work of any batch, long rows in tiles."""
    counts = np.diff(batch.starts)
    row_N = np.repeat(np.arange(len(counts)), counts)
    ints = on_device(np.stack((batch.tokens_N, batch.positions_N, row_N)), device)
    few_N = np.repeat(counts <= FEW, counts)
    place_N = np.arange(len(row_N)) - np.repeat(batch.starts[:-1], counts)
    alone, tiles = np.flatnonzero(few_N), np.flatnonzero(~few_N & (place_N % tile_tokens == 0))
    work = Work(
        positions_N=ints[1],
        row_N=ints[2],
        pages_RP=on_device(batch.pages_RP, device),
        alone_T=on_device(alone, device) if len(alone) else None,
        tiles_T=on_device(tiles, device) if len(tiles) else None,
        tile_tokens=tile_tokens,
    )
    return ints[0], work


def on_device(values: Ints, device: torch.device) -> Tensor:
    """As int32, without waiting for the device."""
    return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(device, non_blocking=True)
