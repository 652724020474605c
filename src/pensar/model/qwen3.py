"""Qwen3: the transformer, dense or mixture of experts, written once for training and serving.

Pre-norm RMSNorm, per-head norm of queries and keys before RoPE, grouped-query attention without biases,
SwiGLU (arXiv 2505.09388, section 2). Parameter names are those of the Hugging Face files.
Shape legend: B batch, T tokens, D hidden, H query heads, K key-value heads, h head_dim, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pensar.base.files import seed_of
from pensar.model import rope
from pensar.model.attention import Attend
from pensar.model.config import ModelConfig
from pensar.model.moe import SparseMLP


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the division at least in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Projections, head norms and rotation; the attention itself is the caller's `attend`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, h = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, h
        self.q_proj = nn.Linear(hidden, config.num_heads * h, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * h, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * h, bias=False)
        self.o_proj = nn.Linear(config.num_heads * h, hidden, bias=False)
        self.q_norm = RMSNorm(h, config.rms_norm_eps)
        self.k_norm = RMSNorm(h, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTHh = rope.rotate(self.q_norm(self.q_proj(x_BTD).view(heads)), cos, sin)
        k_BTKh = rope.rotate(self.k_norm(self.k_proj(x_BTD).view(heads)), cos, sin)
        out_BTHh = attend(self.layer, q_BTHh, k_BTKh, self.v_proj(x_BTD).view(heads))
        out_BTD: Tensor = self.o_proj(out_BTHh.flatten(2))
        return out_BTD


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention, then the MLP, each on normalised input and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMLP(config) if config.num_experts else MLP(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, attend)
        out_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out_BTD


class Backbone(nn.Module):
    """Everything between token ids and the last hidden states; named `model` in the files."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Values come later; torch's own initial ones would load its compiler, a second of every start.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """`hidden = model(tokens, positions, attend)`, then `model.logits(hidden)` where they are needed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._inverse_frequencies: Tensor | None = None
        self._rope_factor = 1.0

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        """Hidden states [B, T, D] after the final norm."""
        x_BTD = self.model.embed_tokens(tokens_BT)
        cos, sin = self.rope_tables(positions_BT)
        cos, sin = cos.to(x_BTD.dtype), sin.to(x_BTD.dtype)
        for block in self.model.layers:
            x_BTD = block(x_BTD, cos, sin, attend)
        hidden_BTD: Tensor = self.model.norm(x_BTD)
        return hidden_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary [..., V] for hidden states [..., D]."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, weight)

    def rope_tables(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the positions, float32; frequencies are computed on first use, never saved."""
        inverse = self._inverse_frequencies
        if inverse is None or inverse.device != positions_BT.device:
            inverse, self._rope_factor = rope.frequencies(self.config)
            self._inverse_frequencies = inverse = inverse.to(positions_BT.device)
        return rope.tables(positions_BT, inverse, self._rope_factor)


def initialize(model: Qwen3, seed: int, *, previous_token_heads: bool = False) -> None:
    """Normal(0, initializer_range) weights, each drawn from a generator seeded by its name.

    The values of a parameter depend on nothing but seed, name and shape, so that every process layout starts
    from the same model. With `previous_token_heads`, two heads of every group of the first layer (or its only one)
    begin by looking at the token before and at the one before that: half of what copying from the context takes, and
    the half that small models are slow to find.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_values(name, parameter.shape, model.config, seed))
        if previous_token_heads:
            _look_back(model, seed)


def initial_values(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """What `initialize` gives the parameter of this name and shape, float32."""
    if name.endswith("norm.weight"):
        return torch.ones(tuple(shape))
    return _normal(shape, seed, name) * config.initializer_range


def _look_back(model: Qwen3, seed: int, strength: float = 4.0) -> None:
    """Gives the first layer heads whose query, wherever it stands, equals the key one or two positions before it.

    All embeddings get a common part `mean`; the projections send it to a fixed key, and to that key turned back by
    RoPE as the query. The key lies in the fastest quarter of the rotations, which tell neighbours apart. The structure
    is only where training begins: nothing holds it there.
    """
    config, block = model.config, model.model.layers[0]
    assert isinstance(block, Block)
    attention = block.self_attn
    h, group = config.head_dim, config.num_heads // config.num_kv_heads
    mean = F.normalize(_normal((config.hidden_size,), seed, "mean"), dim=0)
    model.model.embed_tokens.weight += mean * config.initializer_range * config.hidden_size**0.5
    for head in range(config.num_kv_heads):
        key = _normal((2, h // 2), seed, f"previous.{head}")
        key[:, max(1, h // 8) :] = 0
        key = F.normalize(key, dim=0).flatten() / max(1, h // 8) ** 0.5
        attention.k_proj.weight[head * h : (head + 1) * h] += strength * torch.outer(key, mean)
        for back in range(1, min(group, 2) + 1):
            query = rope.rotate(key.view(1, 1, 1, h), *model.rope_tables(torch.tensor([[-back]]))).flatten()
            first = (head * group + back - 1) * h
            attention.q_proj.weight[first : first + h] += strength * torch.outer(query, mean)


def _normal(shape: Sequence[int], seed: int, name: str) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed_of(seed, name)))
