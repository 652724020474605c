"""Models of every shape and steps over them, for the tests of the native kernels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pensar.infer.native.runner import NativeRunner
from pensar.infer.step import PAGE, StepBatch
from pensar.model.attention import Packed
from pensar.model.config import ModelConfig, Yarn
from pensar.model.qwen3 import Qwen3, initialize

MIXTURE: dict[str, Any] = {
    "num_experts": 8,
    "experts_per_token": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"tied": True},
    "mixture": MIXTURE,
    "mixture-raw-weights": MIXTURE | {"norm_topk_prob": False, "experts_per_token": 3},
    "wide-heads": {"head_dim": 80, "hidden_size": 128, "intermediate_size": 200},
    "many-queries": {"num_heads": 12, "num_kv_heads": 1, "head_dim": 24},
    "odd-sizes": {
        "hidden_size": 50,
        "intermediate_size": 71,
        "vocab_size": 323,
        "head_dim": 10,
        "tied": True,
    },
    "yarn": {"rope_scaling": Yarn(factor=4.0, original_max_positions=16), "max_positions": 256},
}
Row = tuple[list[int], int, list[int]]
"""New tokens, how many the cache holds, pages."""


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Qwen3:
    shape: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "initializer_range": 0.15,
    }
    model = Qwen3(ModelConfig(**(shape | changes))).eval()
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype)


def text(length: int, seed: int = 0, vocab_size: int = 320) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(0, vocab_size, length).tolist()
    return drawn


def pages_for(length: int, first: int = 1) -> list[int]:
    """Consecutive ones, last first, so that order and number differ."""
    return list(range(first, first + -(-length // PAGE)))[::-1]


def batch_of(rows: Sequence[Row], wanted: Sequence[int] | None = None) -> StepBatch:
    """All tokens are wanted unless said."""
    batch = StepBatch.of(rows)
    return batch if wanted is None else replace(batch, wanted_S=np.array(wanted))


def logits_of(runner: NativeRunner, tokens: list[int]) -> torch.Tensor:
    """Of a whole text at once."""
    pages = pages_for(len(tokens))
    runner.reserve(len(pages) + 1)
    return runner.run(batch_of([(tokens, 0, pages)])).logits_SV


def reference(model: Qwen3, tokens: list[int]) -> torch.Tensor:
    """Logits in the model's own type."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens]), torch.arange(len(tokens))[None], Packed()))[0]


def with_adapters(batch: StepBatch, adapters: Sequence[int]) -> StepBatch:
    return replace(batch, adapters_R=np.array(adapters))
