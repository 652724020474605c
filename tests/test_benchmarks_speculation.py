"""The pieces of the benchmark of guesses: a target that costs more and says the same, and what its passes cost."""

import random
from pathlib import Path

import pytest
import torch

from benchmarks import engine_speculation
from pensar.infer.drafts.lookup import Lookup
from pensar.model.attention import Packed
from pensar.text.tokenizer import Tokenizer, train_tokenizer

SHAPES = {"target": (64, 1), "student": (64, 1)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [engine_speculation.document(random.Random(n)) for n in range(60)]
    return train_tokenizer(texts, 400)


def test_layers_that_add_nothing_change_nothing(tokenizer: Tokenizer) -> None:
    model = engine_speculation.trained(tokenizer, SHAPES["target"], 2)
    deep = engine_speculation.deepened(model, 4)
    ids = torch.tensor([tokenizer.encode(engine_speculation.document(random.Random(1)))])
    at = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        ours, theirs = (one.logits(one(ids, at, Packed())) for one in (deep, model))
    assert torch.equal(ours, theirs)
    assert sum(p.numel() for p in deep.parameters()) > 2 * sum(p.numel() for p in model.parameters())


def test_a_pass_of_one_token_costs_one_and_more_tokens_cost_more(tokenizer: Tokenizer) -> None:
    model = engine_speculation.trained(tokenizer, SHAPES["target"], 1)
    costs = engine_speculation.pass_costs(model, 2, rounds=2)
    assert list(costs) == list(engine_speculation.PASSES)
    assert costs[1] == 1.0
    assert 0.8 < costs[9] < 30


def test_models_are_trained_once_and_replies_are_compared(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_speculation, "ROOT", tmp_path)
    first = engine_speculation.models(tokenizer, SHAPES, 2)
    again = engine_speculation.models(tokenizer, SHAPES, 2)
    for ours, theirs in zip(first, again, strict=True):
        for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(left, right)
    asked = [engine_speculation.requests(tokenizer, number, 2, 0.8, 2) for number in range(2)]
    row = engine_speculation.measured("lookup", first[0], Lookup, asked, 2, 0.8, {1: 1.0, 9: 3.0})
    assert row["metric"] == "speculation_lookup_1_layers_batch_2"
    assert row["same_replies"] == "4 of 4"
    kept, passes = row["kept_per_pass"], 1 + (row["guesses_per_pass"]) * 2 / 8
    assert row["limit"] == pytest.approx(row["peer"] * (1 + kept) / passes, rel=0.01)
