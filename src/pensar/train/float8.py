"""Products of the blocks' linear layers in 8-bit floating point, forward and backward; weights stay as they are.

Each tensor is scaled as a whole to the type's range when it is used, by its largest magnitude (arXiv 2209.05433: e4m3
for weights and activations, e5m2 with its wider range for gradients). One scale a tensor lets the same 8-bit
activations serve the forward product and the weights' gradient, which sum over different axes: scales by row would take
a second quantisation there, and cost much of what 8 bits gain. Sums are float32, results in the input's type.
Shape legend: M tokens, K inputs, N outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pensar.model.qwen3 import Qwen3

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNED = 16
"""Sizes that the hardware multiplies are multiples of this."""
LEAST = 1e-12
"""Stands for the largest magnitude of a tensor of zeros."""


@contextmanager
def float8(model: Qwen3, on: bool = True) -> Iterator[None]:
    """Within it, linear layers of the model's blocks multiply in float8 where their sizes allow.

    Embedding, output projection and norms are outside blocks or no products; routers and experts stay in the type of
    the rest. Shards may be set around it; compilation and recomputation within it.
    """
    layers = linears(model) if on else []
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def linears(model: Qwen3) -> list[nn.Linear]:
    """The layers that multiply in float8."""
    return [
        module
        for block in model.model.layers
        for name, module in block.named_modules()
        if type(module) is nn.Linear
        and name != "mlp.gate"
        and len(list(module.parameters())) == 1  # no bias
        and module.in_features % ALIGNED == module.out_features % ALIGNED == 0
    ]


def float8_linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T in float8, and both products of its gradient."""
    out_MN: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight_NK)  # type: ignore[no-untyped-call]
    return out_MN.view(*x.shape[:-1], -1)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor over its scale in float8, and the scale, float32: its largest magnitude becomes the type's largest."""
    largest = torch.finfo(dtype).max
    scale = x.detach().abs().amax().float().clamp(min=LEAST) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return float8_linear(x, layer.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        x8_MK, x_scale = quantize(x_MK, E4M3)
        weight8_NK, weight_scale = quantize(weight_NK, E4M3)
        # The 8-bit activations are kept, at half the memory of bfloat16; the weights are there anyway.
        ctx.save_for_backward(x8_MK, x_scale, weight_NK)
        # The forward pass may sum faster and rougher: its rounding is that of the inputs many times over.
        return _product(x8_MK, x_scale, weight8_NK, weight_scale, x_MK.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8_MK, x_scale, weight_NK = ctx.saved_tensors
        grad8_MN, grad_scale = quantize(grad_MN, E5M2)
        grad_x_MK = grad_weight_NK = None
        if ctx.needs_input_grad[0]:
            weight8_NK, weight_scale = quantize(weight_NK, E4M3)
            weight8_KN = weight8_NK.t().contiguous()
            grad_x_MK = _product(grad8_MN, grad_scale, weight8_KN, weight_scale, grad_MN.dtype, fast=False)
        if ctx.needs_input_grad[1]:
            grad8_NM, x8_KM = (_aligned(y8.t()) for y8 in (grad8_MN, x8_MK))
            grad_weight_NK = _product(grad8_NM, grad_scale, x8_KM, x_scale, weight_NK.dtype, fast=False)
        return grad_x_MK, grad_weight_NK


def _product(
    left8_MK: Tensor,
    left_scale: Tensor,
    right8_NK: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    *,
    fast: bool,
) -> Tensor:
    """left right^T with both sides in rows of what is summed over, as the hardware wants them."""
    return torch._scaled_mm(  # noqa: SLF001 - the name that compilers and selective recomputation know
        left8_MK, right8_NK.t(), scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast
    )


def _aligned(y8_NM: Tensor) -> Tensor:
    """Rows in one piece, with zeros up to a size that the hardware sums over."""
    missing = -y8_NM.shape[1] % ALIGNED
    if not missing:
        return y8_NM.contiguous()
    # Padding by bytes: zero is all zero bits in either type.
    return F.pad(y8_NM.contiguous().view(torch.uint8), (0, missing)).view(y8_NM.dtype)
