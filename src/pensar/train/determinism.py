"""Deterministic training: on one kind of device, the same run gives the same bits each time.

On processors it does so anyway. Accelerators choose among kernels, some of which add up in whatever order threads come.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cudnn


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within it torch takes deterministic forms of its operations, at some cost, and raises where there is none."""
    if not on:
        yield
        return
    # cuBLAS reads it at its first product and is not deterministic without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.manual_seed(0)  # for what draws without a generator of its own
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
