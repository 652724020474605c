"""ModelConfig: the shape of one Qwen3 model."""

from typing import Any

import msgspec

from pensar.base.config import Config
from pensar.base.errors import ConfigError

ROWS_OF_ONE_OPERATOR = 64
"""Rows of an expert, on average, from which training on a CPU takes experts one by one (`model/routed.py`): at 256 it
takes a tenth less time than grouped products over all rows, with fewer its calls cost more than they save."""


class Yarn(Config, frozen=True):
    """YaRN context extension (arXiv 2309.00071) with the meaning of Hugging Face's `rope_scaling`."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Multiplies cosine and sine; None for 0.1 ln(factor) + 1."""


class Chunks(Config, frozen=True):
    """Dual Chunk Attention (arXiv 2402.17463) with the meaning of `dual_chunk_attention_config`."""

    chunk_size: int
    """The largest distance between a query and a key; rows of L trained tokens hold distances up to L - 1."""
    local_size: int
    """Tokens after a chunk's end for which the distance to the chunk before is the true one."""
    original_max_positions: int | None = None
    """Longer texts get YaRN's attention temperature; None for none."""

    def __post_init__(self) -> None:
        if not 0 <= self.local_size < self.chunk_size:
            raise ConfigError(
                f"local_size {self.local_size} is not in 0..chunk_size - 1 ({self.chunk_size - 1}); "
                "a chunk has chunk_size - local_size tokens"
            )

    @property
    def chunk_len(self) -> int:
        """Tokens of one chunk."""
        return self.chunk_size - self.local_size


class ModelConfig(Config, frozen=True):
    """Dense when `num_experts` is 0, else every layer is a mixture of experts."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    intermediate_size: int = 0
    """Width of the dense SwiGLU; unused by a mixture of experts."""
    rope_theta: float = 1_000_000.0
    rope_scaling: Yarn | None = None
    dual_chunk: Chunks | None = None
    """How inference may read texts longer than `max_positions`; training pays no heed to it."""
    max_positions: int = 40_960
    rms_norm_eps: float = 1e-6
    tied: bool = False
    """The output projection is the embedding."""
    initializer_range: float = 0.02
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    """Width of one expert's SwiGLU."""
    norm_topk_prob: bool = True
    router_balance_weight: float = 0.001

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "grouped-query attention shares each key-value head among equally many query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs: use an even number")
        if self.rope_scaling and self.dual_chunk and self.dual_chunk.original_max_positions is not None:
            raise ConfigError(
                f"dual_chunk.original_max_positions is {self.dual_chunk.original_max_positions} beside a "
                "rope_scaling, so that YaRN's temperature would count twice; leave one of them out"
            )
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"experts_per_token {self.experts_per_token} is not in 1..num_experts ({self.num_experts})"
            )
        if not self.num_experts and self.intermediate_size <= 0:
            raise ConfigError("intermediate_size is missing; a dense model needs the width of its SwiGLU")


def replace(config: ModelConfig, **changes: Any) -> ModelConfig:
    """A copy with other values; the derived checks run again."""
    return msgspec.structs.replace(config, **changes)
