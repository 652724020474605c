"""What is learned: bits per byte with Muon and with AdamW on the same bytes; the peer's losses and logits beside ours.

The text is what every Python brings: its library's sources and its reference manual in English, as bytes.
"""

import math
import sysconfig
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.pretrain_steps import TokensOf, batch_of, our_step, peer_of, peer_step, started
from pensar.model.attention import Packed
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
ROWS, CONTEXT = 16, 256
ADAMW_RATES = (1e-3, 1.7e-3, 3e-3)
MUON = OptimizerConfig(lr=3e-3, adamw_lr=3e-3)
HELD_OUT = 10
"""Every such file is held out."""
PARITY = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=384,
    tied=True,
)
"""Heads and rows (256 tokens) as the attention in blocks takes them."""
PARITY_SPARSE = replace(
    PARITY, num_experts=8, experts_per_token=2, moe_intermediate_size=96, router_balance_weight=0.0
)
PARITY_ROWS = 4


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


def text_tokens(rows: int, context: int = CONTEXT) -> TokensOf:
    """Windows of the text to learn from, drawn by the number of the step."""
    data = text()[0]

    def tokens_of(step: int) -> NDArray[np.int32]:
        starts = np.random.default_rng((1, step)).integers(0, len(data) - context, rows)
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


def learned(optimizer: OptimizerConfig, num_tokens: int, windows: int) -> float:
    """Bits per byte after training on so many tokens, with the package's own schedule."""
    steps = num_tokens // (ROWS * CONTEXT)
    model = started(TEXT)
    with ExitStack() as stack:
        step = our_step(
            model,
            text_tokens(ROWS),
            stack,
            optimizer=optimizer,
            compiling=False,
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


def losses(config: ModelConfig, steps: int, compiling: bool) -> tuple[list[float], list[float]]:
    """Ours and the peer's, step by step, from the same weights on the same text, AdamW at the same rate."""
    tokens_of = text_tokens(PARITY_ROWS)
    model = started(config)
    more = {"experts_implementation": "eager"} if config.num_experts else {}
    theirs = peer_step(peer_of(model, **more), tokens_of, compiling=False, fused=False)
    with ExitStack() as stack:
        ours = our_step(model, tokens_of, stack, compiling=compiling)
        pairs = [(ours(), theirs()) for _ in range(steps)]
    return [our for our, _ in pairs], [their for _, their in pairs]


def peers_apart(config: ModelConfig, steps: int) -> float:
    """Largest difference between the losses of two of the peer's own ways to compute experts: rounding alone moves a
    token whose experts are nearly tied to another expert, and losses part from there on."""
    tokens_of, model = text_tokens(PARITY_ROWS), started(config)
    eager, grouped = (
        peer_step(peer_of(model, experts_implementation=way), tokens_of, compiling=False, fused=False)
        for way in ("eager", "grouped_mm")
    )
    return max(abs(eager() - grouped()) for _ in range(steps))


def logits_apart(config: ModelConfig) -> tuple[float, float]:
    """Largest difference of any logit in float32, and the largest logit."""
    model = started(config).eval()
    more = {"experts_implementation": "eager"} if config.num_experts else {}
    peer = peer_of(model, **more).eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, (2, 300)))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.inference_mode():
        ours = model.logits(model(tokens, positions, Packed()))
        theirs = peer(input_ids=tokens).logits
    return float((ours - theirs).abs().max()), float(theirs.abs().max())
