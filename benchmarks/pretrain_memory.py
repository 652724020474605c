"""How much memory a training step or the loading of a model takes, each in a fresh process.

A step's peak is that of resident memory over the steps after two that warm up, above what the process holds between
steps: weights and optimiser state, the same on both sides, and what compiling has left. So it is gradients, activations
and logits. A load's peak is above what the process holds when everything is imported.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.pretrain_steps import (
    DENSE,
    SPARSE,
    our_step,
    peer_model,
    peer_step,
    random_tokens,
    started,
)
from pensar.base.usage import reset_peak, usage_now
from pensar.model.config import ModelConfig, replace
from pensar.model.sizes import VOCAB_SIZE
from pensar.model.weights import load_model

CONFIGS: dict[str, ModelConfig] = {
    "dense": DENSE,
    "moe": SPARSE,
    "vocabulary": replace(DENSE, vocab_size=VOCAB_SIZE),
}
STATUS = Path("/proc/self/status")


def in_fresh_process(call: str) -> int:
    """The bytes that a call of one of this page's functions returns, written as Python."""
    program = f"from benchmarks.pretrain_memory import *; print({call})"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def step_peak(side: str, kind: str, compiling: bool = True) -> int:
    """Bytes that a step takes at its highest beyond what stays between steps; `side` is ours or the peer's."""
    torch.set_num_threads(1)
    config = CONFIGS[kind]
    with ExitStack() as stack:
        if side == "ours":
            step = our_step(started(config), random_tokens(config), stack, compiling=compiling)
        else:
            more = {"experts_implementation": "grouped_mm"} if config.num_experts else {}
            step = peer_step(peer_model(config, **more), random_tokens(config), compiling=compiling)
        for _ in range(2):
            step()
        return _peak_above(lambda: (step(), step()))


def load_peak(folder: str) -> int:
    """Bytes at the highest while a model is loaded and every page of it looked at."""
    torch.set_num_threads(1)
    kept = []

    def load() -> None:
        kept.append(load_model(Path(folder)))
        touched(kept[0])

    return _peak_above(load)


def touched(model: torch.nn.Module) -> int:
    """Looks at every page of the weights, so that none is only promised."""
    pages = (p.detach().flatten().view(torch.uint8)[::4096] for p in model.parameters())
    return sum(int(page.sum()) for page in pages)


def _peak_above(work: Callable[[], object]) -> int:
    gc.collect()
    _return_free_memory()
    before = resident()
    reset_peak()
    work()
    return usage_now().peak_memory_bytes - before


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    rows = (row.split() for row in STATUS.read_text().splitlines())
    return next(int(row[1]) * 1024 for row in rows if row[0] == "VmRSS:")


def _return_free_memory() -> None:
    """glibc keeps freed memory; what a step needs would hide in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
