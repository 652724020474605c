"""Tiny models for the tests of this room."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pensar.model import native
from pensar.model.attention import Packed
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize

SPARSE = {"num_experts": 8, "experts_per_token": 2, "moe_intermediate_size": 24, "intermediate_size": 0}


@pytest.fixture
def shape() -> Callable[..., ModelConfig]:
    """A tiny shape; `sparse=True` makes it a mixture of experts."""

    def make(*, sparse: bool = False, **changes: Any) -> ModelConfig:
        values = {
            "vocab_size": 96,
            "hidden_size": 48,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "intermediate_size": 80,
            # Wide weights, so that logits differ clearly from each other.
            "initializer_range": 0.15,
        }
        return ModelConfig(**(values | (SPARSE if sparse else {}) | changes))

    return make


@pytest.fixture
def build(shape: Callable[..., ModelConfig]) -> Callable[..., Qwen3]:
    """A tiny initialised model in evaluation mode, its norm weights not all one."""

    def make(*, seed: int = 0, **changes: Any) -> Qwen3:
        model = Qwen3(shape(**changes))
        initialize(model, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model.eval()

    return make


@pytest.fixture
def logits_of() -> Callable[..., torch.Tensor]:
    """Logits [B, T, V] of whole rows, or of packed ones; positions count from `start`."""

    def compute(
        model: Qwen3, tokens: torch.Tensor, *, start: int = 0, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        positions = torch.arange(start, start + tokens.shape[1]).expand_as(tokens)
        return model.logits(model(tokens, positions, Packed(segments)))

    return compute


@pytest.fixture(params=["kernels", "library"])
def whose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes experts and attention: our own kernels, in the types that they can, or the library."""
    name = str(request.param)
    if name == "library":
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        if not native.takes(torch.float32):
            pytest.skip("there is no compiler, or no AVX-512")
    return name
