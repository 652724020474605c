"""Hugging Face's config.json and generation_config.json, both key generations, to and from ModelConfig.

Transformers 5 moved rope_theta and rope_scaling into rope_parameters and num_experts to num_local_experts;
version 4 and several engines then silently use their defaults. So both spellings are written, either is read.
"""

from collections.abc import Mapping
from typing import Any

import torch

from pensar.base.errors import ModelError
from pensar.model.config import Chunks, ModelConfig, Yarn

_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
_YARN_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
}


def to_hf(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    eos_id: int | None = None,
    bos_id: int | None = None,
    pad_id: int | None = None,
) -> dict[str, Any]:
    """The content of config.json; the token ids are left out where None."""
    kind = "qwen3_moe" if config.num_experts else "qwen3"
    rope = _rope_keys(config)
    content: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": _name(dtype),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "max_window_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default", **(rope or {})},
        "rope_scaling": rope,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tied,
        "torch_dtype": _name(dtype),
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if config.num_experts:
        content |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "intermediate_size": config.moe_intermediate_size * config.experts_per_token,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "num_local_experts": config.num_experts,
            "output_router_logits": False,
            "router_aux_loss_coef": config.router_balance_weight,
        }
    if config.dual_chunk is not None:
        content["dual_chunk_attention_config"] = _chunk_keys(config.dual_chunk)
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    return content | {key: value for key, value in ids.items() if value is not None}


def from_hf(content: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """ModelConfig of a config.json; ModelError, naming `source`, for what is not Qwen3's architecture."""
    read = _Reader(content, source)
    _refuse_other_architectures(content, source)
    num_experts = read.optional("num_experts", content.get("num_local_experts", 0))
    if content.get("model_type") == "qwen3_moe" and not num_experts:
        raise ModelError(f"{source} has neither num_experts nor num_local_experts, yet is a mixture")
    num_heads = read.required("num_attention_heads")
    theta, yarn = _rope(content, source)
    return ModelConfig(
        vocab_size=read.required("vocab_size"),
        hidden_size=read.required("hidden_size"),
        num_layers=read.required("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=read.optional("num_key_value_heads", num_heads),
        head_dim=read.optional("head_dim", 128),
        intermediate_size=0 if num_experts else read.required("intermediate_size"),
        rope_theta=theta,
        rope_scaling=yarn,
        dual_chunk=_chunks(content, source),
        max_positions=read.optional("max_position_embeddings", 32_768),
        rms_norm_eps=read.optional("rms_norm_eps", 1e-6),
        tied=read.optional("tie_word_embeddings", False),
        initializer_range=read.optional("initializer_range", 0.02),
        num_experts=num_experts,
        experts_per_token=read.required("num_experts_per_tok") if num_experts else 0,
        moe_intermediate_size=read.required("moe_intermediate_size") if num_experts else 0,
        # A file that is silent means Hugging Face's default, which differs from the official Qwen3 files.
        norm_topk_prob=read.optional("norm_topk_prob", False) if num_experts else True,
        router_balance_weight=read.optional("router_aux_loss_coef", 0.001),
    )


def generation_defaults(
    *, eos_id: int | None = None, bos_id: int | None = None, pad_id: int | None = None
) -> dict[str, Any]:
    """The content of generation_config.json: Qwen3's sampling for thinking; padding also ends an answer."""
    content: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    if eos_id is not None:
        content["eos_token_id"] = [eos_id] if pad_id is None else [eos_id, pad_id]
    if bos_id is not None:
        content["bos_token_id"] = bos_id
    if pad_id is not None:
        content["pad_token_id"] = pad_id
    return content


class _Reader:
    """Keys of a config, with an error that names the file."""

    def __init__(self, content: Mapping[str, Any], source: str) -> None:
        self.content, self.source = content, source

    def required(self, key: str) -> Any:
        if self.content.get(key) is None:
            raise ModelError(f"{self.source} has no {key}; a Qwen3 model directory states it")
        return self.content[key]

    def optional(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        return default if value is None else value


def _refuse_other_architectures(content: Mapping[str, Any], source: str) -> None:
    kind = content.get("model_type")
    if kind not in _ARCHITECTURES:
        names = ", ".join(content.get("architectures") or ["no class"])
        raise ModelError(
            f"{source} describes model_type {kind!r} ({names}); Pensar opens {' and '.join(_ARCHITECTURES)}"
        )
    unsupported = {
        "attention_bias": content.get("attention_bias") or False,
        "use_sliding_window": content.get("use_sliding_window") or False,
        "mlp_only_layers": content.get("mlp_only_layers") or False,
        "quantization_config": bool(content.get("quantization_config")),
        "decoder_sparse_step": content.get("decoder_sparse_step", 1) != 1,
        "hidden_act": content.get("hidden_act", "silu") != "silu",
    }
    for key, present in unsupported.items():
        if present:
            raise ModelError(
                f"{source} sets {key} to {content[key]!r}; no released Qwen3 does, nor can Pensar"
            )


def _rope_keys(config: ModelConfig) -> dict[str, Any] | None:
    yarn = config.rope_scaling
    if yarn is None:
        return None
    keys = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    return keys if yarn.attention_factor is None else keys | {"attention_factor": yarn.attention_factor}


def _rope(content: Mapping[str, Any], source: str) -> tuple[float, Yarn | None]:
    """Base and YaRN from rope_parameters (generation 5) or rope_theta and rope_scaling (generation 4)."""
    rope = dict(content.get("rope_parameters") or content.get("rope_scaling") or {})
    theta = rope.get("rope_theta", content.get("rope_theta"))
    if theta is None:
        raise ModelError(
            f"{source} has neither rope_theta nor rope_parameters.rope_theta; add it: "
            "the released Qwen3 models use 1000000, the later -2507 ones 5000000"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    unknown = sorted(key for key, value in rope.items() if key not in _YARN_KEYS and value is not None)
    if kind != "yarn" or unknown:
        raise ModelError(
            f"{source} asks for RoPE scaling {kind!r} with {unknown or 'the usual keys'}; "
            f"Pensar knows 'yarn' with {sorted(_YARN_KEYS)}"
        )
    if rope.get("factor") is None:
        raise ModelError(f"{source} asks for YaRN and gives no factor")
    original = rope.get("original_max_position_embeddings") or content.get("max_position_embeddings")
    if original is None:
        raise ModelError(f"{source} asks for YaRN and gives no original_max_position_embeddings")
    return float(theta), Yarn(
        factor=float(rope["factor"]),
        original_max_positions=int(original),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=rope.get("attention_factor"),
    )


def _chunk_keys(chunks: Chunks) -> dict[str, int]:
    keys = {"chunk_size": chunks.chunk_size, "local_size": chunks.local_size}
    original = chunks.original_max_positions
    return keys if original is None else keys | {"original_max_position_embeddings": original}


def _chunks(content: Mapping[str, Any], source: str) -> Chunks | None:
    """Dual Chunk Attention; keys about sparse attention, which only approximates it, are passed over."""
    keys = content.get("dual_chunk_attention_config")
    if not keys:
        return None
    read = _Reader(keys, f"{source}: dual_chunk_attention_config")
    # Engines read 0 as no temperature.
    original = read.optional("original_max_position_embeddings", 0) or None
    return Chunks(
        chunk_size=read.required("chunk_size"),
        local_size=read.required("local_size"),
        original_max_positions=original,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
