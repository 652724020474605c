"""What is written opens elsewhere: keras-hub computes the same, llama.cpp's and vLLM's names cover every tensor."""

import pytest
import torch
from safetensors import safe_open

from pensar.model.attention import Packed
from pensar.model.weights import save_model


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
    tokens = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(tokens, torch.arange(40).expand(2, -1), Packed())
        found = backbone({"token_ids": tokens, "padding_mask": torch.ones_like(tokens)})
        torch.testing.assert_close(found, hidden, rtol=1e-5, atol=2e-5)
        scores = backbone.get_layer("token_embedding")(found, reverse=True)
        torch.testing.assert_close(scores, model.logits(hidden), rtol=1e-5, atol=2e-5)
