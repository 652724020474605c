"""Pre-training: rows masked where documents begin, and stages that go on from one another."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pensar.base.config import canonical
from pensar.base.errors import ConfigError
from pensar.base.files import read_jsonl
from pensar.base.stage import Runtime
from pensar.data.order import PretrainData, Row
from pensar.data.shards import Shards
from pensar.model.sizes import SIZES
from pensar.model.weights import load_model
from pensar.text.tokenizer import Tokenizer
from pensar.train.pretrain import PretrainConfig, Shape, documents_of_step, in_parts, row_batches, run
from tiny import tiny_tokenizer, write_shards

SHAPE = Shape(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48)


def test_nothing_is_predicted_across_the_beginning_of_a_document() -> None:
    segments = [[1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1], [1, 2, 2, 2, 3, 4]]
    data = SimpleNamespace(
        row=lambda i: Row(np.arange(6, dtype=np.int32) + 10 * i, np.array(segments[i], np.int32))
    )
    config = PretrainConfig(tokens=18, mixture="general", context=6, batch_tokens=12)
    (batch,) = row_batches(data, config)(0)  # type: ignore[arg-type]
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]]
    assert batch.ce.tolist() == [[0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert batch.tokens.dtype == batch.positions.dtype == np.int32
    alone = PretrainConfig(tokens=18, mixture="general", context=6, batch_tokens=1)
    (third,) = row_batches(data, alone)(2)  # type: ignore[arg-type]
    assert third.ce.tolist() == [[0, 0, 1, 1, 0, 0]]
    assert third.positions.tolist() == [[0, 0, 1, 2, 0, 0]]


def test_the_number_of_steps_follows_from_the_tokens() -> None:
    config = PretrainConfig(tokens=1000, mixture="general", context=16, batch_tokens=40)
    assert config.loop().steps == 1000 // 32
    assert PretrainConfig(tokens=1, mixture="general", context=16).loop().steps == 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    texts = [f"True or false, left to right: {'T and F ' * (n % 7 + 1)}" for n in range(60)]
    documents = [tokenizer.encode(text) for text in texts]
    size = tokenizer.vocab_size
    shards = write_shards(folder / "shards", documents, end=tokenizer.pad_id, vocab_size=size)
    return {"shards": shards, "tokenizer": folder / "tokenizer"}


def test_rows_of_real_shards_begin_their_documents_masked(corpus: dict[str, Path]) -> None:
    end = Tokenizer.load(corpus["tokenizer"]).pad_id
    data = PretrainData(corpus["shards"], mixture="general", context=48, seed=1)
    config = PretrainConfig(tokens=960, mixture="general", context=48, batch_tokens=96)
    for step in range(4):
        (batch,) = row_batches(data, config)(step)
        after_end = np.zeros_like(batch.tokens, bool)
        after_end[:, 1:] = batch.tokens[:, :-1] == end
        after_end[:, 0] = True
        assert (batch.ce == ~after_end).all()
        assert (batch.positions[after_end] == 0).all()


def test_a_stage_goes_on_from_the_one_before_with_its_own_context_and_base(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    first = PretrainConfig(tokens=96 * 6, mixture="general", context=48, batch_tokens=96, shape=SHAPE)
    runtime = Runtime(logs=tmp_path / "logs")
    (tmp_path / "first").mkdir()
    counts = run(first, corpus, tmp_path / "first", runtime)
    model = load_model(tmp_path / "first")
    assert counts == {
        "steps": 6,
        "tokens": 576,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    losses = [row["loss"] for row in read_jsonl(tmp_path / "first" / "metrics.jsonl", dict)]
    assert losses[-1] < losses[0]
    assert not (tmp_path / "first" / "checkpoint.pt").exists()
    longer = PretrainConfig(
        tokens=96, mixture="long", context=96, batch_tokens=96, rope_theta=1e6, max_positions=192
    )
    (tmp_path / "second").mkdir()
    run(longer, corpus | {"model": tmp_path / "first"}, tmp_path / "second", runtime)
    second = load_model(tmp_path / "second")
    assert (model.config.rope_theta, model.config.max_positions) == (10_000.0, 48)
    assert (second.config.rope_theta, second.config.max_positions) == (1e6, 192)
    assert second.config.hidden_size == 32
    assert not torch.equal(second.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_stage_without_a_beginning_is_refused(corpus: dict[str, Path], tmp_path: Path) -> None:
    config = PretrainConfig(tokens=96, mixture="general", context=48)
    with pytest.raises(ConfigError, match="neither a `shape` to begin with nor a `model`"):
        run(config, corpus, tmp_path, Runtime(logs=tmp_path / "logs"))


def test_a_step_tells_the_documents_that_it_learned_from(corpus: dict[str, Path], tmp_path: Path) -> None:
    config = PretrainConfig(tokens=960, mixture="general", context=48, batch_tokens=96)
    shards = Shards(corpus["shards"])
    order = {name: number for number, name in enumerate(shards.docs["doc_id"].to_pylist())}
    data = PretrainData(corpus["shards"], mixture="general", context=48, seed=1)
    batches_of = row_batches(data, config)

    def agrees(step: int, data_step: int) -> None:
        (batch,) = batches_of(data_step)
        shown = documents_of_step(config, corpus["shards"], tmp_path, step)
        assert {item.source for item in shown} == {shards.docs["source"].to_pylist()[0]}
        for row, (tokens, segments) in enumerate(zip(batch.tokens, batch.segments, strict=True)):
            pieces = [tokens[segments == segment].tolist() for segment in dict.fromkeys(segments.tolist())]
            named = [shards.tokens(order[item.document]).tolist() for item in shown if item.row == row]
            assert len(pieces) == len(named)
            for piece, whole in zip(pieces, named, strict=True):
                assert any(whole[at : at + len(piece)] == piece for at in range(len(whole)))

    for step in range(10):
        agrees(step, step)
    gap = {"step": 3, "back_to": 2, "first": 2, "last": 3, "reason": "the loss is not finite (loss nan)"}
    (tmp_path / "skipped.json").write_text(json.dumps([gap]))
    agrees(1, 1)
    agrees(2, 4)
    with pytest.raises(ConfigError, match=r"step 10 is not one of the stage's 10"):
        documents_of_step(config, corpus["shards"], tmp_path, 10)


def test_a_shape_may_be_a_size_of_the_table() -> None:
    named = Shape(size="30b-a3b").model(5_000, rope_theta=10_000.0, max_positions=4_096)
    table = SIZES["30b-a3b"]
    assert (named.vocab_size, named.rope_theta, named.max_positions) == (5_000, 10_000.0, 4_096)
    same = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "num_experts", "moe_intermediate_size")
    assert [getattr(named, name) for name in same] == [getattr(table, name) for name in same]


def test_a_size_takes_the_place_of_every_number() -> None:
    assert Shape(size="0.6b", num_layers=3, tied=False) == Shape(size="0.6b")
    assert canonical(Shape(size="0.6b", num_layers=3)) == {"size": "0.6b"}
    with pytest.raises(ConfigError, match=r"'0.7b' is not in the table"):
        Shape(size="0.7b")


def test_micro_batches_are_the_rows_of_the_step_and_train_the_same(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    config = PretrainConfig(tokens=1024, mixture="general", context=64, batch_tokens=256, shape=SHAPE)
    data = PretrainData(corpus["shards"], mixture="general", context=64, seed=1)
    whole, parts = row_batches(data, config)(3)[0], in_parts(row_batches(data, config), 3)(3)
    assert [len(part.tokens) for part in parts] == [2, 1, 1]
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens[[0, 3, 1, 2]])
    found = {}
    for layout in ("shard=1", "accumulate=4"):
        out = tmp_path / layout
        run(config, corpus, out, Runtime(logs=tmp_path / "logs", layout=layout))
        found[layout] = [
            json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
    assert found["accumulate=4"] == pytest.approx(found["shard=1"], abs=1e-5)
