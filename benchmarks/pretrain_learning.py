"""What is learned: bits per byte with Muon and with AdamW, in float32 and in bfloat16, on the same bytes.

The text is what every Python brings: its library's sources and its reference manual in English, as bytes.
"""

import math
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.pretrain_steps import TokensOf, batch_of, our_step, started
from pensar.model.config import ModelConfig, replace
from pensar.model.qwen3 import Qwen3
from pensar.train.loss import LossConfig, batch_loss
from pensar.train.optimizer import OptimizerConfig
from pensar.train.schedule import ScheduleConfig, rate

TEXT = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=384,
    tied=True,
)
WIDE = replace(TEXT, hidden_size=256, num_layers=2, head_dim=64, intermediate_size=768)
WIDE_SPARSE = replace(WIDE, num_experts=32, experts_per_token=4, moe_intermediate_size=128)
"""As wide as a training stage asks for before it multiplies in bfloat16 on a CPU."""
ROWS, CONTEXT = 16, 256
ADAMW_RATES = (1e-3, 1.7e-3, 3e-3)
MUON = OptimizerConfig(lr=3e-3, adamw_lr=3e-3)
HELD_OUT = 10
"""Every such file is held out."""


@lru_cache(maxsize=1)
def text() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bytes to learn from and bytes held out: English and Python, piece by piece."""
    from pydoc_data import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(path for path in library.glob("*.py") if path.stat().st_size > 2_000)
    pieces = [path.read_bytes() for path in sources]
    pieces += [topics.topics[name].encode() for name in sorted(topics.topics)]
    kept = b"".join(piece for number, piece in enumerate(pieces) if number % HELD_OUT)
    held_out = b"".join(piece for number, piece in enumerate(pieces) if number % HELD_OUT == 0)
    return np.frombuffer(kept, np.uint8), np.frombuffer(held_out, np.uint8)


def text_tokens(rows: int, context: int = CONTEXT, seed: int = 0) -> TokensOf:
    """Windows of the text to learn from, drawn by the seed and the number of the step."""
    data = text()[0]

    def tokens_of(step: int) -> NDArray[np.int32]:
        starts = np.random.default_rng((1 + seed, step)).integers(0, len(data) - context, rows)
        return np.stack([data[start : start + context] for start in starts]).astype(np.int32)

    return tokens_of


def bits_per_byte(model: Qwen3, windows: int) -> float:
    """Over windows spread evenly over the text held out."""
    data = text()[1]
    starts = np.linspace(0, len(data) - CONTEXT, windows).astype(int)
    lost = weight = 0.0
    model.eval()
    with torch.no_grad():
        for first in range(0, windows, ROWS):
            rows = [data[start : start + CONTEXT] for start in starts[first : first + ROWS]]
            _, totals = batch_loss(
                model, batch_of(np.stack(rows).astype(np.int32)), (1.0, 1.0, 1.0), LossConfig()
            )
            lost, weight = lost + totals.ce, weight + totals.ce_weight
    return lost / weight / math.log(2)


def learned(
    optimizer: OptimizerConfig,
    num_tokens: int,
    windows: int,
    *,
    config: ModelConfig = TEXT,
    seed: int = 0,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Bits per byte after training on so many tokens, with the package's own schedule; in float32 they are counted."""
    steps = num_tokens // (ROWS * CONTEXT)
    model = started(config, seed)
    with ExitStack() as stack:
        step = our_step(
            model,
            text_tokens(ROWS, seed=seed),
            stack,
            optimizer=optimizer,
            compiling=False,
            within=within,
            scale=lambda number: rate(ScheduleConfig(), number, steps),
        )
        for _ in range(steps):
            step()
    return bits_per_byte(model, windows)


def muon_and_adamw(
    num_tokens: int, windows: int, rates: tuple[float, ...]
) -> tuple[float, dict[float, float]]:
    """Bits per byte by Muon, and by AdamW at each of the rates."""
    adamw = {lr: learned(OptimizerConfig(muon=False, adamw_lr=lr), num_tokens, windows) for lr in rates}
    return learned(MUON, num_tokens, windows), adamw
