"""What the accelerator that a tensor lies on can compute with."""

from functools import cache

import torch

AMPERE = (8, 0)
"""Compute capability from which bfloat16, flash attention and grouped products have units or kernels."""
ADA = (8, 9)
"""Compute capability from which 8-bit floating-point products have units (Hopper is 9.0)."""


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
