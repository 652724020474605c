"""What a shape costs: parameters, floating-point operations and cache bytes, by formula from ModelConfig."""

from typing import NamedTuple

from pensar.model.config import ModelConfig


class Parameters(NamedTuple):
    """Numbers of parameters; `active` are those that one token meets (all of them in a dense model)."""

    total: int
    non_embedding: int
    """Without the embedding and without an untied output projection."""
    active: int
    active_non_embedding: int


def parameters(config: ModelConfig) -> Parameters:
    """Equal to counting the tensors of the module."""
    norms = config.num_layers * (2 * config.hidden_size + 2 * config.head_dim) + config.hidden_size
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tied else 2)
    dense = norms + config.num_layers * (_attention(config) + _router(config))
    body = dense + config.num_layers * _mlp(config, config.num_experts)
    active = dense + config.num_layers * _mlp(config, config.experts_per_token)
    return Parameters(body + embeddings, body, active + embeddings, active)


def flops_per_token(config: ModelConfig, context: int) -> float:
    """Floating-point operations of training on one token of a causal context, forward and backward.

    6 for every weight that multiplies the token (output projection included, embedding look-up not), plus
    12 L H h T/2 for scores and values over half of T tokens (the count of PaLM, arXiv 2204.02311, appendix B,
    with the causal half).
    """
    layer = _attention(config) + _router(config) + _mlp(config, config.experts_per_token)
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    return 6 * weights + 12 * config.num_layers * config.num_heads * config.head_dim * context / 2


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """The forward third of `flops_per_token`: reading a prompt, or writing an answer of `context` tokens."""
    return flops_per_token(config, context) / 3


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that the key-value cache takes for one token over all layers; 2 bytes a value is bfloat16."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_value


def _attention(config: ModelConfig) -> int:
    """Weights of the four projections of a layer."""
    return 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)


def _router(config: ModelConfig) -> int:
    return config.hidden_size * config.num_experts


def _mlp(config: ModelConfig, num_experts: int) -> int:
    """Weights of the SwiGLU of a layer, or of so many of its experts."""
    if not config.num_experts:
        return 3 * config.hidden_size * config.intermediate_size
    return num_experts * 3 * config.hidden_size * config.moe_intermediate_size
