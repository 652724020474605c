"""Adapters: many in one batch, each reply the one that a model with that adapter merged gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pensar.base.errors import DataError, ModelError, PensarError
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.step import StepBatch, rows_of
from pensar.model.adapter import load_adapter, save_adapter
from pensar.model.lora import LoraConfig, adapt, adapted_weights, merged
from pensar.model.qwen3 import Qwen3

SPARSE = {"num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 16, "intermediate_size": 0}
Make = Callable[..., Qwen3]


def adapter_in(folder: Path, model: Qwen3, seed: int, **config: Any) -> Path:
    """A strong change of `model`, which stays as it is."""
    adapt(model, LoraConfig(**{"rank": 2, "alpha": 8.0, **config}), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in adapted_weights(model):
            weight.lora_b.normal_(generator=generator, std=0.3)
            if weight.magnitude is not None:
                weight.magnitude *= 1 + 0.5 * torch.rand(weight.magnitude.shape, generator=generator)
    save_adapter(model, folder)
    return folder


def with_adapter(model: Qwen3, folder: Path) -> Qwen3:
    load_adapter(model, folder)
    return merged(model).eval()


@pytest.mark.parametrize("shape", [{}, SPARSE], ids=["dense", "experts"])
def test_rows_of_several_adapters_share_a_batch(
    make_model: Make, naive: Any, tmp_path: Path, shape: dict[str, int]
) -> None:
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    configs = {"plain": {}, "narrow": {"targets": ("q_proj", "v_proj"), "rank": 5}}
    configs["dora"] = {"dora": True, "targets": attention} if shape else {"dora": True}
    engine = Engine(make_model(**shape))
    for number, (name, config) in enumerate(configs.items()):
        engine.load_adapter(name, adapter_in(tmp_path / name, make_model(**shape), number, **config))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in (5, 40, 17, 3, 40, 9, 12, 31)]
    names = ["plain", "", "narrow", "dora", "plain", "", "narrow", "dora"]
    done = engine.run(
        [
            Request(str(i), prompt, SamplingParams(max_tokens=12), adapter=name)
            for i, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        ]
    )
    models = {name: with_adapter(make_model(**shape), tmp_path / name) for name in configs}
    models[""] = make_model(**shape)
    expected = [
        naive(models[name], prompt, 12)["tokens"] for prompt, name in zip(prompts, names, strict=True)
    ]
    assert [completion.tokens for completion in done] == expected
    assert len({tuple(tokens) for tokens in expected}) > 6


def test_a_text_is_not_shared_between_adapters(make_model: Make, tmp_path: Path) -> None:
    engine, prompt = Engine(make_model()), list(range(60))
    engine.load_adapter("a", adapter_in(tmp_path / "a", make_model(), 1))

    def cached(name: str) -> int:
        [completion] = engine.run([Request("x", prompt, SamplingParams(max_tokens=1), adapter=name)])
        return completion.num_cached_tokens

    assert [cached("a"), cached(""), cached("a"), cached("")] == [0, 0, 48, 48]
    engine.unload_adapter("a")
    engine.load_adapter("a", adapter_in(tmp_path / "b", make_model(), 2))
    assert cached("a") == 0


def test_adapters_come_and_go_while_others_run(make_model: Make, naive: Any, tmp_path: Path) -> None:
    engine = Engine(make_model())
    engine.load_adapter("a", adapter_in(tmp_path / "a", make_model(), 1))
    assert all(parameter.requires_grad for parameter in engine.model.parameters()), "a trainer may share it"
    engine.submit(Request("x", [1, 2, 3], SamplingParams(max_tokens=8), adapter="a"))
    tokens = [token for piece in engine.step() for token in piece.tokens]
    with pytest.raises(ModelError, match="'a' is used by 1 unfinished requests"):
        engine.unload_adapter("a")
    engine.load_adapter("b", adapter_in(tmp_path / "b", make_model(), 2))
    while engine.num_running:
        tokens += [token for piece in engine.step() for token in piece.tokens]
    assert tokens == naive(with_adapter(make_model(), tmp_path / "a"), [1, 2, 3], 8)["tokens"]
    engine.unload_adapter("a")
    with pytest.raises(ModelError, match="asks for adapter 'a'; loaded: b"):
        engine.submit(Request("y", [1], SamplingParams(max_tokens=1), adapter="a"))
    with pytest.raises(ModelError, match="no adapter 'a' is loaded; loaded: b"):
        engine.unload_adapter("a")
    with pytest.raises(ModelError, match="'b' is loaded already"):
        engine.load_adapter("b", tmp_path / "b")


def test_an_adapter_of_another_model_is_refused_and_everything_goes_on(
    make_model: Make, naive: Any, tmp_path: Path
) -> None:
    engine = Engine(make_model())
    wide = adapter_in(tmp_path / "wide", make_model(intermediate_size=96), 1)
    with pytest.raises(PensarError):
        engine.load_adapter("wide", wide)
    with pytest.raises((ModelError, DataError)):
        engine.load_adapter("none", tmp_path / "none")
    with pytest.raises(ModelError, match="needs a name"):
        engine.load_adapter("", wide)
    [completion] = engine.run([Request("x", [5, 6], SamplingParams(max_tokens=5))])
    assert completion.tokens == naive(make_model(), [5, 6], 5)["tokens"]


def test_rows_of_a_batch_are_its_rows() -> None:
    batch = StepBatch(
        tokens_N=np.asarray([10, 20, 21, 22, 30]),
        positions_N=np.asarray([7, 0, 1, 2, 9]),
        starts=np.asarray([0, 1, 4, 5]),
        lengths_R=np.asarray([8, 3, 10]),
        pages_RP=np.asarray([[1], [2], [3]]),
        wanted_S=np.asarray([0, 2, 3, 4]),
        adapters_R=np.asarray([0, -1, 0]),
    )
    part, wanted = rows_of(batch, np.asarray([1, 2]))
    assert part.tokens_N.tolist() == [20, 21, 22, 30]
    assert part.starts.tolist() == [0, 3, 4]
    assert part.wanted_S.tolist() == [1, 2, 3]
    assert wanted.tolist() == [1, 2, 3]
    assert part.pages_RP.tolist() == [[2], [3]]
