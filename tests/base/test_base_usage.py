"""Freed memory stays within, and goes back to the system at the end."""

import ctypes
import sys

import pytest
import torch

from pensar.base.usage import STATUS, keeping_freed_memory

MIB = 2**20


def resident() -> int:
    """Of this process, bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not GLIBC, reason="the setting is one of glibc")
def test_freed_memory_stays_and_then_goes_back() -> None:
    before = resident()
    with keeping_freed_memory():
        with keeping_freed_memory():
            pieces = [torch.ones(4 * MIB) for _ in range(8)]
            held = resident()
        del pieces
        kept = resident()
    after = resident()
    assert held - before > 120 * MIB
    assert held - kept < 8 * MIB
    assert kept - after > 100 * MIB


def test_it_ends_after_an_error_too() -> None:
    with pytest.raises(ValueError, match="told"), keeping_freed_memory():
        raise ValueError("told")
