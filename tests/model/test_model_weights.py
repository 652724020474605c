"""Model folders: written, opened, and refused with a reason."""

import hashlib
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pensar.base.errors import ModelError
from pensar.model import weights
from pensar.model.weights import check_tokenizer, load_model, read_config, save_model

VARIANTS = {
    "dense": {},
    "tied": {"tied": True},
    "sparse": {"sparse": True},
    "sparse and tied": {"sparse": True, "tied": True},
}


@pytest.fixture
def folder(build, tmp_path):
    save_model(build(), tmp_path)
    return tmp_path


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_saved_is_loaded(build, tmp_path, variant, dtype):
    model = build(**VARIANTS[variant]).to(dtype)
    save_model(model, tmp_path / "new" / "folder")
    again = load_model(tmp_path / "new" / "folder")
    assert again.config == model.config == read_config(tmp_path / "new" / "folder")
    assert not again.training
    for (name, found), (expected_name, expected) in zip(
        again.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == expected_name
        assert found.requires_grad
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_weights_can_be_loaded_in_another_type(folder, build):
    model = load_model(folder, dtype=torch.bfloat16)
    for found, expected in zip(model.parameters(), build().parameters(), strict=True):
        assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_models_stay_in_their_files_and_can_be_changed_there_alone(
    build, tmp_path, monkeypatch, variant
):
    model = build(**VARIANTS[variant])
    save_model(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(weights, "COPIED", 0)
    mapped = load_model(tmp_path)
    for found, expected in zip(mapped.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)
    if sys.platform == "linux":
        assert _is_mapped(mapped.model.embed_tokens.weight, tmp_path)
    with torch.no_grad():
        for parameter in mapped.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    save_model(build(seed=5, **VARIANTS[variant]), tmp_path)  # by renaming: what is loaded keeps its file
    for found, expected in zip(mapped.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected + 1.0)
    for found, expected in zip(
        load_model(tmp_path, dtype=torch.bfloat16).parameters(), model.parameters(), strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert found.shape == expected.shape


def _is_mapped(tensor, folder):
    """Whether the address lies in a mapping of the folder's file."""
    for row in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(place, 16) for place in row.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return str(folder) in row
    return False


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_models_give_equal_bytes_and_no_leftovers(build, tmp_path, variant):
    digests = []
    for name in ("a", "b"):
        save_model(build(**VARIANTS[variant]), tmp_path / name, eos_id=3, pad_id=1)
        files = sorted(path for path in (tmp_path / name).iterdir())
        assert [path.name for path in files] == ["config.json", "generation_config.json", "model.safetensors"]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_is_what_the_reference_writer_writes(build, tmp_path, variant):
    save_model(build(**VARIANTS[variant]), tmp_path)
    ours = tmp_path / "model.safetensors"
    save_file(load_file(ours), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_names_on_disk_are_those_of_hugging_face(build, tmp_path):
    save_model(build(sparse=True, tied=True, num_layers=1), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    block = "model.layers.0."
    assert names == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        f"{block}input_layernorm.weight",
        f"{block}post_attention_layernorm.weight",
        *(
            f"{block}self_attn.{part}.weight"
            for part in ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"]
        ),
        f"{block}mlp.gate.weight",
        *(f"{block}mlp.experts.{e}.{part}_proj.weight" for e in range(8) for part in ("gate", "up", "down")),
    }


def test_a_tied_model_may_bring_the_same_output_projection_but_no_other(build, tmp_path):
    save_model(build(tied=True), tmp_path)
    _rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(tmp_path).lm_head is None
    _rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ModelError, match="set tie_word_embeddings to false"):
        load_model(tmp_path)


def test_shards_are_opened_through_their_index(folder, build):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for number, (name, tensor) in enumerate(tensors.items()):
        list(halves.values())[number % 2][name] = tensor
    for name, part in halves.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    places = {name: file for file, part in halves.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for found, expected in zip(load_model(folder).parameters(), build().parameters(), strict=True):
        assert torch.equal(found, expected)

    moved = next(iter(halves["model-00001-of-00002.safetensors"]))
    _edit(index, lambda c: c["weight_map"].update({moved: "model-00002-of-00002.safetensors"}))
    with pytest.raises(ModelError, match=f"lacks {moved}"):
        load_model(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors does not exist"):
        load_model(folder)


def test_experts_may_also_be_stacked_on_disk(build, tmp_path):
    model = build(sparse=True)
    save_model(model, tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    for found, expected in zip(load_model(tmp_path).parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_model(folder)


def test_a_pickle_is_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        load_model(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "cut short: 0 bytes"),
        (lambda data: data[:-100], r"should hold [\d,]+ bytes by its header and holds"),
        (lambda data: data[:500], "cut short or no safetensors file"),
        (lambda data: data + b"more", r"should hold [\d,]+ bytes by its header and holds"),
        (lambda data: data[:8] + b"}" * 50 + data[58:], "damaged header"),
        (lambda data: data[:8] + data[8:].replace(b"F32", b"X32", 1), "is not readable as safetensors"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (lambda data: struct.pack("<Q", 2) + b"[]", "damaged header"),
        (lambda data: struct.pack("<Q", 2) + b"{}", "tensors are missing"),
    ],
    ids=["empty", "short", "header-short", "long", "header-broken", "type-unknown", "lfs", "list", "nothing"],
)
def test_a_damaged_file_is_named_with_what_is_wrong(folder, damage, message):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_missing_and_unexpected_tensors_are_named_with_the_nearest(folder):
    name = "model.layers.1.self_attn.q_norm.weight"

    def rename(tensors):
        tensors["model.layers.1.self_attn.query_norm.weight"] = tensors.pop(name)

    _rewrite(folder, rename)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert f"1 tensors are missing, first {name}" in str(caught.value)
    assert "nearest in the file: model.layers.1.self_attn.query_norm.weight" in str(caught.value)


def test_an_unexpected_tensor_alone_is_refused(folder):
    _rewrite(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    )
    with pytest.raises(ModelError, match=r"not part of it, first model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(folder)


def test_a_missing_output_projection_names_the_setting(folder):
    _rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match="sets tie_word_embeddings to true"):
        load_model(folder)


def test_a_wrong_shape_names_both(folder):
    _rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(
        ModelError, match=r"model\.norm\.weight has shape \[47\], config\.json asks for \[48\]"
    ):
        load_model(folder)


def test_weights_that_are_no_floats_are_refused(folder):
    _rewrite(folder, lambda t: t.update({"model.embed_tokens.weight": torch.ones(96, 48, dtype=torch.int8)}))
    with pytest.raises(ModelError, match="holds I8 weights"):
        load_model(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "holds a list")])
def test_a_damaged_config_is_named(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_config(folder)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(shape):
    check_tokenizer(shape(), 90)
    check_tokenizer(shape(), 96)
    with pytest.raises(ModelError, match="97 tokens, the model 96 embeddings"):
        check_tokenizer(shape(), 97)


def test_generation_defaults_are_those_of_qwen3_thinking(build, tmp_path):
    save_model(build(), tmp_path, eos_id=7, bos_id=5, pad_id=5)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 5,
        "do_sample": True,
        "eos_token_id": [7, 5],
        "pad_token_id": 5,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (7, 5, 5)
