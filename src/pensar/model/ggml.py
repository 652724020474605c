"""ggml's types of numbers: how llama.cpp stores a tensor, whole or in blocks of 32 with a scale each.

Sources: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp (block_q8_0, block_q4_0). A block is a float16 scale d
and 32 integers n; the value is d n, with n from -127 to 127 in q8_0 and from -8 to 7 in q4_0. There the scale has the
sign that sends the value of largest size to -8, and a byte holds places i and i + 16 of the block, the former in its
low half.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
"""Values that share a scale."""


class Kind(NamedTuple):
    """A type of numbers."""

    number: int
    """In a GGUF file's list of tensors."""
    file_type: int
    """What llama.cpp calls a file whose matrices mostly have it."""
    block: int
    """Values of a row that are stored together."""
    num_bytes: int
    """Of a block."""
    stored: Callable[[Tensor], Tensor]
    """Float32 values [rows, columns] as bytes [rows, bytes]."""
    values: Callable[[Tensor], Tensor]
    """The way back."""


def row_bytes(kind: Kind, columns: int) -> int:
    """Bytes of a row of so many values."""
    assert columns % kind.block == 0
    return columns // kind.block * kind.num_bytes


def _whole(dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    def stored(values: Tensor) -> Tensor:
        return values.to(dtype).contiguous().view(torch.uint8)

    def values(stored: Tensor) -> Tensor:
        return stored.view(dtype).float()

    return stored, values


def _q8_0(values: Tensor) -> Tensor:
    blocks = values.reshape(len(values), -1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return _joined(scale, _rounded(blocks * _inverse(scale)).to(torch.int8).view(torch.uint8))


def _q8_0_values(stored: Tensor) -> Tensor:
    scale, numbers = _parted(stored, KINDS["q8_0"].num_bytes)
    return (scale * numbers.view(torch.int8).float()).flatten(1)


def _q4_0(values: Tensor) -> Tensor:
    blocks = values.reshape(len(values), -1, BLOCK)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    numbers = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    low, high = numbers.split(BLOCK // 2, -1)
    return _joined(scale, low | high << 4)


def _q4_0_values(stored: Tensor) -> Tensor:
    scale, pairs = _parted(stored, KINDS["q4_0"].num_bytes)
    numbers = torch.cat((pairs & 15, pairs >> 4), -1)
    return (scale * (numbers.float() - 8)).flatten(1)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for a block of zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def _rounded(values: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero as in C."""
    size = values.abs()
    whole = size.floor()
    return values.sign() * (whole + (size - whole >= 0.5))


def _joined(scale: Tensor, numbers: Tensor) -> Tensor:
    return torch.cat((scale.half().view(torch.uint8), numbers), -1).flatten(1)


def _parted(stored: Tensor, num_bytes: int) -> tuple[Tensor, Tensor]:
    blocks = stored.view(len(stored), -1, num_bytes)
    return blocks[..., :2].contiguous().view(torch.float16).float(), blocks[..., 2:].contiguous()


KINDS: Mapping[str, Kind] = {
    "f32": Kind(0, 0, 1, 4, *_whole(torch.float32)),
    "f16": Kind(1, 1, 1, 2, *_whole(torch.float16)),
    "bf16": Kind(30, 32, 1, 2, *_whole(torch.bfloat16)),
    "q8_0": Kind(8, 7, BLOCK, 2 + BLOCK, _q8_0, _q8_0_values),
    "q4_0": Kind(2, 2, BLOCK, 2 + BLOCK // 2, _q4_0, _q4_0_values),
}
