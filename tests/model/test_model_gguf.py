"""A GGUF file holds what llama.cpp's own converter would write, tensor by tensor and key by key."""

import json
import os

import numpy as np
import pytest
import torch

from pensar.base.errors import ConfigError, ModelError
from pensar.model.config import Yarn
from pensar.model.ggml import KINDS
from pensar.model.gguf import export_gguf
from pensar.model.weights import load_model, save_model
from pensar.text.tokenizer import train_tokenizer

KINDS_OF_MODEL = {
    "dense": {},
    "tied": {"tied": True},
    "mixture": {"sparse": True, "moe_intermediate_size": 32},
    "yarn": {"rope_scaling": Yarn(factor=4.0, original_max_positions=16), "max_positions": 64},
    "yarn-attention": {
        "rope_scaling": Yarn(factor=4.0, original_max_positions=16, attention_factor=1.5, beta_fast=16.0),
        "max_positions": 64,
    },
}
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}
OF_THE_FOLDER = {"general.name", "general.size_label", "GGUF.kv_count"}
"""What the converter says beside the model: names that it makes of the folder's."""


@pytest.fixture
def directory(build, tmp_path):
    """A model directory with 20 rows of the embedding that no token has."""

    def make(**changes):
        tokenizer = train_tokenizer(["to be or not to be, that is the question"] * 4, 300)
        model = build(**({"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96} | changes))
        save_model(model, tmp_path / "model", eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        tokenizer.save(tmp_path / "model")
        return tmp_path / "model"

    return make


def by_the_converter(source, out, kind, monkeypatch):
    base = pytest.importorskip("conversion.base", exc_type=ImportError)
    import gguf
    from conversion import get_model_class

    # The converter knows a pre-tokenizer by what released vocabularies make of a text; one just trained is not listed.
    monkeypatch.setattr(base.TextModel, "get_vocab_base_pre", lambda self, tokenizer: "qwen2")
    (architecture,) = json.loads((source / "config.json").read_text())["architectures"]
    with torch.inference_mode():
        file_type = gguf.LlamaFileType[FILE_TYPES[kind]]
        get_model_class(architecture)(source, file_type, out, eager=True).write()
    return gguf.GGUFReader(out)


@pytest.mark.filterwarnings("ignore")  # the converter's own
@pytest.mark.parametrize("kind", FILE_TYPES)
@pytest.mark.parametrize("of_model", KINDS_OF_MODEL)
def test_the_converter_writes_the_same_tensors_and_keys(directory, tmp_path, monkeypatch, of_model, kind):
    source = directory(**KINDS_OF_MODEL[of_model])
    theirs = by_the_converter(source, tmp_path / "theirs.gguf", kind, monkeypatch)
    import gguf

    ours = gguf.GGUFReader(export_gguf(source, tmp_path / "ours.gguf", kind))
    tensors = {tensor.name: tensor for tensor in ours.tensors}
    assert len(tensors) == len(ours.tensors)
    assert tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = tensors[tensor.name]
        assert found.tensor_type == tensor.tensor_type, tensor.name
        assert found.shape.tolist() == tensor.shape.tolist(), tensor.name
        assert found.data.tobytes() == tensor.data.tobytes(), tensor.name
        assert found.data_offset % 32 == 0
    names = theirs.fields.keys() - OF_THE_FOLDER
    assert ours.fields.keys() - OF_THE_FOLDER == names
    for name in names:
        assert ours.fields[name].types == theirs.fields[name].types, name
        assert ours.fields[name].contents() == theirs.fields[name].contents(), name


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16", "f16"])
def test_blocks_are_those_of_ggml_and_come_back(kind):
    quants = pytest.importorskip("gguf.quants", exc_type=ImportError)
    from gguf import GGMLQuantizationType

    values = (
        torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 64)[:, None]
    )
    values[3, :32] = 0
    values[4, 32:64] = torch.arange(-16, 16) / 2  # halves, to be rounded away from zero
    stored = KINDS[kind].stored(values)
    of = GGMLQuantizationType[kind.upper()]
    assert of == KINDS[kind].number
    reference = quants.quantize(values.numpy(), of)
    assert stored.numpy().tobytes() == reference.tobytes()
    np.testing.assert_array_equal(KINDS[kind].values(stored).numpy(), quants.dequantize(reference, of))


def test_q4_0_matrices_are_those_of_ggml_and_norms_stay_float32(directory, tmp_path):
    gguf = pytest.importorskip("gguf", exc_type=ImportError)
    source = directory(tied=True)
    weights = dict(load_model(source).named_parameters())
    reader = gguf.GGUFReader(export_gguf(source, tmp_path / "model.gguf", "q4_0"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    gate = weights["model.layers.1.mlp.gate_proj.weight"].detach().numpy()
    expected = gguf.quants.quantize(gate, gguf.GGMLQuantizationType.Q4_0)
    assert tensors["blk.1.ffn_gate.weight"].data.tobytes() == expected.tobytes()
    assert tensors["blk.1.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_0


def test_equal_directories_give_equal_files_and_no_draft_stays(directory, tmp_path):
    source = directory()
    first = export_gguf(source, tmp_path / "first.gguf").read_bytes()
    assert export_gguf(source, tmp_path / "second.gguf").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.gguf", "model", "second.gguf"]


def test_long_matrices_are_written_in_pieces(directory, tmp_path, monkeypatch):
    source = directory()
    whole = export_gguf(source, tmp_path / "whole.gguf", "q4_0").read_bytes()
    monkeypatch.setattr("pensar.model.gguf.CHUNK", 200)
    assert export_gguf(source, tmp_path / "pieces.gguf", "q4_0").read_bytes() == whole


def test_an_unknown_kind_is_named_with_the_known_ones(directory, tmp_path):
    with pytest.raises(ConfigError, match=r"'q5_1' is not one of f32, f16, bf16, q8_0, q4_0"):
        export_gguf(directory(), tmp_path / "model.gguf", "q5_1")


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (float("nan"), "q8_0", r"blk\.0\.ffn_down\.weight holds values that are not finite"),
        (1e6, "f16", r"blk\.0\.ffn_down\.weight holds 1e\+06, more than float16 can; write f32 or bf16"),
        (1e8, "q8_0", r"blk\.0\.ffn_down\.weight holds 1e\+08, more than float16 can"),
    ],
)
def test_a_weight_that_does_not_fit_is_named_and_no_file_stays(directory, tmp_path, value, kind, message):
    source = directory()
    model = load_model(source)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[1, 2] = value
    save_model(model, source, eos_id=1, pad_id=0)
    with pytest.raises(ModelError, match=message):
        export_gguf(source, tmp_path / "model.gguf", kind)
    assert os.listdir(tmp_path) == ["model"]  # noqa: PTH208


def test_a_tokenizer_that_cuts_texts_otherwise_is_refused(directory, tmp_path):
    source = directory()
    path = source / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="does not cut texts as Qwen does"):
        export_gguf(source, tmp_path / "model.gguf")


def test_experts_whose_weights_are_not_renormalised_are_refused(directory, tmp_path):
    with pytest.raises(ModelError, match="norm_topk_prob is false"):
        export_gguf(directory(sparse=True, norm_topk_prob=False), tmp_path / "model.gguf")
