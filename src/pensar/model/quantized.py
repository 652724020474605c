"""Quantized: frozen weights in few bits under a model in training, as in QLoRA (arXiv 2305.14314).

`nf4` has four bits a weight by the quantiles of the normal distribution, in blocks of 64 whose scales are quantised
in turn; `int8` has eight, scaled row by row. A layer keeps nothing but the codes: forward and backward pass each
compute the weight from them and let it go.
Shape legend: M rows, D hidden, O outputs, I inputs, E experts, B blocks of b weights, G groups of g blocks.
"""

from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pensar.base.config import nearest
from pensar.base.errors import ConfigError
from pensar.model.moe import Experts, grouped
from pensar.model.qwen3 import Qwen3

Bits = Literal["int8", "nf4"]

BLOCK = 64
"""Weights that share a scale in nf4 (section 3)."""
GROUP = 256
"""Scales that share a scale of their own (double quantisation)."""
FLOAT8_MAX = 448.0
"""The largest number of the eight-bit float with four exponent bits."""


class Quantized(nn.Module):
    """A frozen weight [O, I], or the stacked weights [E, O, I] of experts, in few bits; called, it multiplies by it.

    Buffers are bytes, whatever they mean, so that a change of the model's type leaves them as they are.
    """

    codes: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype

    def forward(self, x: Tensor, counts_E: Tensor | None = None) -> Tensor:
        """x W^T: [..., I] -> [..., O]; of experts for rows that are sorted by expert, `counts_E` for each."""
        out: Tensor = _Product.apply(x, self, counts_E)  # type: ignore[no-untyped-call]
        return out

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for; in the type of what was quantised unless another is asked for."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """What the weight takes in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())


class Int8(Quantized):
    """round(127 w / max |w|) of each row, and 4 bytes for the row: 8 + 32 / I bits a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        values = weight.detach().float()
        scales = values.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(scales > 0, values / scales, 0.0).round()
        self.codes = nn.Buffer(codes.to(torch.int8))
        self.scales = nn.Buffer(scales.view(torch.uint8))

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        values: Tensor = self.codes * self.scales.view(torch.float32)
        return values.to(dtype or self.dtype)


class Nf4(Quantized):
    """The nearest of 16 values to w / max |w| of each block: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight.

    The blocks' maxima less their mean are eight-bit floats, with a float32 scale for each group of them. The last
    block and the last group are filled up with what is theirs.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        blocks_Bb = _rows(weight.detach().float().flatten(), BLOCK, fill=0.0)
        maxima_B = blocks_Bb.abs().amax(-1)
        self.mean = nn.Buffer(maxima_B.mean().view(1).view(torch.uint8))
        rest_Gg = _rows(maxima_B - maxima_B.mean(), GROUP, fill=0.0)
        scales_G = rest_Gg.abs().amax(-1, keepdim=True) / FLOAT8_MAX
        eighths_Gg = torch.where(scales_G > 0, rest_Gg / scales_G, 0.0).to(torch.float8_e4m3fn)
        self.maxima = nn.Buffer(eighths_Gg.view(torch.uint8).flatten()[: len(maxima_B)].clone())
        self.scales = nn.Buffer(scales_G.view(torch.uint8))
        self.pairs = _pairs()
        table = codebook()
        borders = (table[1:] + table[:-1]) / 2
        relative_Bb = torch.where(maxima_B[:, None] > 0, blocks_Bb / maxima_B[:, None], 0.0)
        nibbles = torch.bucketize(relative_Bb, borders.float()).to(torch.uint8).flatten()
        self.codes = nn.Buffer(nibbles[0::2] | nibbles[1::2] << 4)

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        fine = torch.promote_types(dtype, torch.float32)
        rest_Gg = _rows(self.maxima.view(torch.float8_e4m3fn).to(torch.float32), GROUP, fill=0.0)
        maxima_B = (rest_Gg * self.scales.view(torch.float32)).flatten()[: len(self.maxima)]
        maxima_B = maxima_B + self.mean.view(torch.float32)
        pairs = self.pairs.to(device=self.device, dtype=fine)
        blocks_Bb = F.embedding(self.codes.int(), pairs).view(-1, BLOCK)
        blocks_Bb *= maxima_B[:, None].to(fine)
        return blocks_Bb.flatten()[: self.shape.numel()].view(self.shape).to(dtype)


_KINDS: dict[str, type[Quantized]] = {"int8": Int8, "nf4": Nf4}


class OpenExperts(nn.Module):
    """SwiGLU of experts whose stacked weights may be modules, called with rows sorted by expert."""

    gate_up_proj: nn.Parameter | nn.Module
    down_proj: nn.Parameter | nn.Module

    def __init__(self, gate_up_proj: nn.Parameter | nn.Module, down_proj: nn.Parameter | nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, sorted_x_MD: Tensor, counts_E: Tensor) -> Tensor:
        gate, up = product(sorted_x_MD, self.gate_up_proj, counts_E).chunk(2, dim=-1)
        return product(F.silu(gate) * up, self.down_proj, counts_E)


def codebook() -> Tensor:
    """The 16 values of NF4, float64: quantiles of the normal distribution, scaled to -1..1, with 0 among them.

    Eight probabilities evenly from d to 1/2 and nine from 1/2 to 1 - d; 1/2 counts once (section 3). d is the mean of
    1/32 and 1/30, half the distance of 16 and of 15 quantiles, as in the authors' code.
    """
    d = (1 / 32 + 1 / 30) / 2
    below = torch.linspace(d, 0.5, 8, dtype=torch.float64)
    above = torch.linspace(0.5, 1 - d, 9, dtype=torch.float64)
    quantiles = torch.special.ndtri(torch.cat([below, above[1:]]))
    values: Tensor = quantiles / quantiles[-1]
    return values


def quantize(model: Qwen3, bits: Bits) -> None:
    """Replaces the weights of every linear layer in the blocks, routers apart, by codes; the rest is left as it is.

    The change is made weight by weight, so that memory never holds more than one beyond the model.
    """
    if bits not in _KINDS:
        raise ConfigError(f"bits is {bits!r}; {nearest(str(bits), get_args(Bits))}")
    kind = _KINDS[bits]
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and not is_router(name):
                block.set_submodule(name, kind(module.weight))
            elif isinstance(module, Experts):
                block.set_submodule(name, OpenExperts(kind(module.gate_up_proj), kind(module.down_proj)))


def is_router(name: str) -> bool:
    """Whether a module of this name decides between experts: it is small and what it decides is not."""
    return name.endswith("mlp.gate")


def product(x: Tensor, weight: Tensor | nn.Module, counts_E: Tensor | None = None) -> Tensor:
    """`multiplied` where the weight may also be a module that multiplies in its own way."""
    if isinstance(weight, nn.Module):
        out: Tensor = weight(x, counts_E)
        return out
    return multiplied(x, weight, counts_E)


def multiplied(x: Tensor, weight: Tensor, counts_E: Tensor | None = None) -> Tensor:
    """x W^T, with one W for all rows, or with each expert's for the rows that are sorted by it."""
    return F.linear(x, weight) if counts_E is None else grouped(x, weight, counts_E)


class _Product(torch.autograd.Function):
    """y = x W^T and dx = dy W, with W from its codes both times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantized, counts_E: Tensor | None) -> Tensor:
        ctx.weight, ctx.counts_E, ctx.dtype = weight, counts_E, x.dtype
        return multiplied(x, weight.whole(x.dtype), counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.weight.whole(gradient.dtype)
        return multiplied(gradient, weight.mT, ctx.counts_E).to(ctx.dtype), None, None


@cache
def _pairs() -> Tensor:
    """[256, 2]: the two values of each byte of codes, the lower four bits first; one table for all weights."""
    byte = torch.arange(256)
    return codebook()[torch.stack([byte & 15, byte >> 4], dim=-1)].float()


def _rows(values: Tensor, length: int, fill: float) -> Tensor:
    """A vector as rows of one length, the last filled up."""
    return F.pad(values, (0, -len(values) % length), value=fill).view(-1, length)
