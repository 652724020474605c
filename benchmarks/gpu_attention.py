"""Rates of the kernels for attention in training on a GPU: whole rows by each backend, packed documents by each way."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_training import seconds_of
from pensar.model import flash
from pensar.model.attention import Packed

SHAPES = ((8, 4_096, 8), (1, 32_768, 4))
"""Rows, tokens of a row, documents of a row where they are packed."""
HEADS, KV_HEADS, SIZE = 16, 8, 128


class Rate(NamedTuple):
    name: str
    teraflops: float


def measured(device: torch.device, rounds: int) -> Iterator[Rate]:
    """Forward and backward, in operations that causal attention within documents needs."""
    for rows, num_tokens, documents in SHAPES:
        for packed in (False, True):
            length = num_tokens // documents if packed else num_tokens
            # 4 H h T / 2 a token forward for scores and values, and two and a half times that backward.
            flops = 3.5 * 4 * HEADS * SIZE * length / 2 * rows * num_tokens
            segments = (
                (torch.arange(num_tokens, device=device) // length + 1).expand(rows, -1).int().contiguous()
            )
            for name, attend in _ways(segments, packed=packed).items():
                step = _step(attend, rows, num_tokens, device)
                seconds = seconds_of({name: step}, rounds)[name]
                kind = "packed" if packed else "whole"
                yield Rate(f"attention_{kind}_{num_tokens}_{name}", flops / seconds / 1e12)


def _ways(segments: Tensor, *, packed: bool) -> dict[str, Callable[..., Tensor]]:
    documents = Packed(segments)
    blocks = flash.block_mask(segments)
    ways: dict[str, Callable[..., Tensor]] = {
        "chosen": lambda q, k, v: documents(0, q, k, v),
        "flex": lambda q, k, v: flash.flex(q, k, v, blocks),
    }
    if not packed:
        backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        ways |= {name: _by(backend) for name, backend in backends.items()}
    return ways


def _by(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


def _step(
    attend: Callable[..., Tensor], rows: int, num_tokens: int, device: torch.device
) -> Callable[[], dict[str, float]]:
    given = [
        torch.randn(rows, num_tokens, heads, SIZE, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    grad = torch.randn_like(given[0])

    def step() -> dict[str, float]:
        torch.autograd.grad(attend(*given), given, grad)
        return {}

    return step
