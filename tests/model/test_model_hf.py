"""config.json of both generations, to and from ModelConfig."""

import json

import pytest
import torch

from pensar.base.errors import ConfigError, ModelError
from pensar.model.config import ModelConfig, Yarn, replace
from pensar.model.hf import from_hf, to_hf
from pensar.model.sizes import SIZES

YARN = Yarn(factor=4.0, original_max_positions=32_768)
NEW_KEYS = {"rope_parameters", "num_local_experts", "dtype"}
OLD_KEYS = {"rope_theta", "rope_scaling", "num_experts", "torch_dtype"}

# The published file of Qwen3-0.6B, as it is.
QWEN3_0_6B = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
"initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
"max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
"num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
"sliding_window": null, "tie_word_embeddings": true,
"torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
"use_sliding_window": false, "vocab_size": 151936}"""


def test_the_official_file_is_the_row_of_the_table_both_ways():
    content = json.loads(QWEN3_0_6B)
    assert from_hf(content) == SIZES["0.6b"]
    written = to_hf(SIZES["0.6b"], dtype=torch.bfloat16, eos_id=151645, bos_id=151643)
    del content["transformers_version"]
    assert content.items() <= written.items()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dropped", [NEW_KEYS, OLD_KEYS, set()], ids=["version 4", "version 5", "both"])
def test_each_generation_alone_gives_the_whole_shape(name, dropped):
    for config in (SIZES[name], replace(SIZES[name], rope_scaling=YARN, norm_topk_prob=True)):
        content = to_hf(config)
        assert NEW_KEYS - {"num_local_experts"} < content.keys()
        assert OLD_KEYS - {"num_experts"} < content.keys()
        kept = {key: value for key, value in content.items() if key not in dropped}
        assert from_hf(json.loads(json.dumps(kept))) == config


def test_mixtures_are_named_in_both_spellings():
    content = to_hf(SIZES["30b-a3b"])
    assert content["num_experts"] == content["num_local_experts"] == 128
    assert content["architectures"] == ["Qwen3MoeForCausalLM"]
    assert content["norm_topk_prob"] is True
    assert content["intermediate_size"] == 6144  # unused, and stated by the official file
    assert (content["decoder_sparse_step"], content["mlp_only_layers"]) == (1, [])


def test_ids_are_written_only_when_known():
    assert not {"eos_token_id", "bos_token_id", "pad_token_id"} & to_hf(SIZES["tiny"]).keys()
    assert to_hf(SIZES["tiny"], pad_id=0)["pad_token_id"] == 0


def test_the_first_spelling_of_yarn_is_read():
    content = to_hf(SIZES["4b"]) | {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}
    assert from_hf(content).rope_scaling == Yarn(factor=4.0, original_max_positions=40_960)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, r"'llama' \(LlamaForCausalLM\)"),
        ({"model_type": None, "architectures": None}, "model_type None"),
        ({"attention_bias": True}, "attention_bias to True"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step to 2"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"model_type": "qwen3_moe"}, "neither num_experts nor num_local_experts"),
        ({"rope_theta": None, "rope_parameters": None}, "neither rope_theta nor"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "longrope"}}, "RoPE scaling 'longrope'"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 2, "mscale": 1}}, "mscale"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "no factor"),
    ],
)
def test_what_is_not_qwen3_is_refused_with_its_key(change, message):
    with pytest.raises(ModelError, match=message) as caught:
        from_hf(to_hf(SIZES["tiny"]) | change, "folder/config.json")
    assert "folder/config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "not a multiple of num_kv_heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"intermediate_size": 0}, "intermediate_size is missing"),
        ({"num_experts": 4, "experts_per_token": 5}, r"experts_per_token 5 is not in 1\.\.num_experts \(4\)"),
    ],
)
def test_impossible_shapes_are_refused(shape, change, message):
    with pytest.raises(ConfigError, match=message):
        shape(**change)


def test_a_file_without_norm_topk_prob_means_hugging_faces_default():
    content = to_hf(SIZES["30b-a3b"])
    del content["norm_topk_prob"]
    assert from_hf(content).norm_topk_prob is False
    assert isinstance(from_hf(content), ModelConfig)
