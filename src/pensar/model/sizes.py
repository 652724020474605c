"""SIZES: the shapes by name, one row a size: the official Qwen3 family, two sizes between, and tiny ones."""

from collections.abc import Mapping
from types import MappingProxyType

from pensar.base.config import nearest
from pensar.base.errors import ConfigError
from pensar.model.config import ModelConfig, replace

VOCAB_SIZE = 151_936
"""Rows of the official embedding: 151,669 tokens, padded to a multiple of 256."""

INTERPOLATED = frozenset({"3b", "22b"})
"""Sizes that were never released; their shapes lie between those of their neighbours in the family."""


def _dense(
    hidden: int, layers: int, heads: int, kv_heads: int, width: int, *, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=width,
        tied=tied,
    )


def _sparse(hidden: int, layers: int, heads: int, kv_heads: int, expert_width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        num_experts=128,
        experts_per_token=8,
        moe_intermediate_size=expert_width,
    )


def _tiny(shape: ModelConfig) -> ModelConfig:
    """For a laptop's core: the vocabulary comes from the recipe's own tokenizer, the heads are narrow."""
    return replace(shape, vocab_size=2_048, head_dim=32, max_positions=4_096, rope_theta=10_000.0)


SIZES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "tiny": _tiny(_dense(128, 4, 4, 2, 384, tied=True)),
        "tiny-moe": replace(_tiny(_sparse(128, 4, 4, 2, 128)), tied=True, num_experts=8, experts_per_token=2),
        "tiny-student": _tiny(_dense(96, 3, 3, 1, 256, tied=True)),
        "0.6b": _dense(1024, 28, 16, 8, 3072, tied=True),
        "1.7b": _dense(2048, 28, 16, 8, 6144, tied=True),
        "3b": _dense(2304, 34, 24, 8, 8448, tied=True),
        "4b": _dense(2560, 36, 32, 8, 9728, tied=True),
        "8b": _dense(4096, 36, 32, 8, 12288),
        "14b": _dense(5120, 40, 40, 8, 17408),
        "22b": _dense(5120, 52, 48, 8, 20480),
        "32b": _dense(5120, 64, 64, 8, 25600),
        "30b-a3b": _sparse(2048, 48, 32, 4, 768),
        "235b-a22b": _sparse(4096, 94, 64, 4, 1536),
    }
)


def size(name: str, vocab_size: int | None = None) -> ModelConfig:
    """The shape of a named size, with another vocabulary if given; ConfigError names the nearest size."""
    if name not in SIZES:
        raise ConfigError(f"model size {name!r} is not in the table; {nearest(name, list(SIZES))}")
    return SIZES[name] if vocab_size is None else replace(SIZES[name], vocab_size=vocab_size)
