"""Rotary position embedding: frequencies with an adjustable base (ABF) and YaRN, and the rotation itself.

Shape legend: B batch, T tokens, H heads, h head_dim.
"""

import math

import torch
from torch import Tensor

from pensar.model.config import ModelConfig, Yarn


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [h / 2] in float32 and the factor that YaRN puts on cosine and sine."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is None:
        return inverse, 1.0
    return _yarn(inverse, config.head_dim, config.rope_theta, config.rope_scaling)


def tables(positions_BT: Tensor, inverse: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, 1, h] in float32 for the given positions."""
    angles_BTh = positions_BT[..., None].float() * inverse
    angles_BTh = torch.cat((angles_BTh, angles_BTh), dim=-1)[:, :, None]
    return angles_BTh.cos() * factor, angles_BTh.sin() * factor


def rotate(x_BTHh: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first half of each head against the second."""
    left, right = x_BTHh.chunk(2, dim=-1)
    return x_BTHh * cos + torch.cat((-right, left), dim=-1) * sin


def _yarn(inverse: Tensor, head_dim: int, theta: float, yarn: Yarn) -> tuple[Tensor, float]:
    def dimension(rotations: float) -> float:
        """The pair of dimensions that turns `rotations` times within the original context."""
        span = yarn.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    factor = yarn.attention_factor
    if factor is None:
        factor = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return inverse * (1 - interpolated) + inverse / yarn.factor * interpolated, factor
