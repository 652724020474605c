"""Within `exact` a trainer sees the engine's bits, and its gradients are torch's."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from pensar.base.errors import ConfigError
from pensar.base.ranks import World
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.native.exact import exact
from pensar.infer.native.runner import NativeRunner
from pensar.model.attention import Packed
from pensar.text.packing import collate, one_per_row
from pensar.text.sample import Sample
from pensar.train.head import chosen
from pensar.train.loss import LossConfig, batch_loss, weights_of
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import train_step
from tests.infer.native_work import MIXTURE, build, logits_of, reference, text

SHAPES = {"dense": {}, "tied": {"tied": True}, "mixture": MIXTURE}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_packed_rows_have_the_bits_of_each_text_alone(shape, weights):
    model = build(**SHAPES[shape])
    runner = NativeRunner(model, weights)
    texts = [text(length, length) for length in (5, 40, 17, 1, 33)]
    tokens = torch.tensor([[*texts[0], *texts[1], 0], [*texts[3], *texts[2], *text(28, 9)]])
    positions = torch.tensor([[*range(5), *range(40), 0], [0, *range(17), *range(28)]])
    segments = torch.tensor([[1] * 5 + [2] * 40 + [0], [1] + [2] * 17 + [3] * 28])
    with exact(model, weights, threads=2):
        found = model.logits(model(tokens, positions, Packed(segments)))
    for row, start, alone in ((0, 0, texts[0]), (0, 5, texts[1]), (1, 1, texts[2])):
        assert torch.equal(found[row, start : start + len(alone)], logits_of(runner, alone))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_and_its_gradients_are_those_of_the_plain_model_up_to_rounding(shape):
    samples = [
        Sample(tokens=np.array(text(length, length), np.int32), ce=np.ones(length, np.float32))
        for length in (30, 12)
    ]
    batch = collate([samples], length=48)
    found = {}
    for name in ("plain", "exact"):
        model = build(**SHAPES[shape]).train()
        norms = weights_of([batch], World())
        if name == "exact":
            with exact(model):
                loss, _ = batch_loss(model, batch, norms, LossConfig())
                loss.backward()
        else:
            loss, _ = batch_loss(model, batch, norms, LossConfig())
            loss.backward()
        found[name] = (loss.detach(), {key: weight.grad for key, weight in model.named_parameters()})
    torch.testing.assert_close(found["exact"][0], found["plain"][0], rtol=1e-5, atol=1e-5)
    for key, grad in found["plain"][1].items():
        torch.testing.assert_close(found["exact"][1][key], grad, rtol=1e-3, atol=1e-5, msg=key)


def test_a_step_of_several_batches_counts_the_experts_of_all_of_them():
    """In a pass beforehand, which learns nothing."""
    batches = [
        one_per_row(
            [Sample(tokens=np.array(text(n, n), np.int32), ce=np.ones(n, np.float32)) for n in lengths]
        )
        for lengths in ((20, 30), (25, 7, 1))
    ]
    found = {}
    for name in ("plain", "exact"):
        model = build(**MIXTURE, router_balance_weight=0.5).train()
        optimizer = Optimizer(model, OptimizerConfig(muon=False, adamw_lr=1e-3))
        with exact(model) if name == "exact" else nullcontext():
            steps = [train_step(model, optimizer, batches, 1.0, World(), LossConfig()) for _ in range(2)]
        found[name] = steps
    assert found["plain"][0]["balance"] > 1.01
    for own, plain in zip(found["exact"], found["plain"], strict=True):
        assert own == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("shape", ["dense", "tied"])
def test_a_model_of_sixteen_bits_learns_from_the_engine_s_values(shape):
    model = build(dtype=torch.bfloat16, **SHAPES[shape]).train()
    samples = [
        Sample(tokens=np.array(text(length, length), np.int32), ce=np.ones(length, np.float32))
        for length in (30, 12)
    ]
    batch = collate([samples], length=48)
    norms, found = weights_of([batch], World()), {}
    for name, within in (("plain", nullcontext()), ("exact", exact(model, "bfloat16"))):
        with within:
            loss, _ = batch_loss(model, batch, norms, LossConfig())
            loss.backward()
        found[name] = torch.cat([weight.grad.flatten() for weight in model.parameters()]).float()
        model.zero_grad()
        assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert torch.cosine_similarity(found["exact"], found["plain"], dim=0) > 0.995
    runner = NativeRunner(model, "bfloat16")
    with exact(model, "bfloat16"), torch.no_grad():
        assert torch.equal(reference(model, text(30, 30)), logits_of(runner, text(30, 30)))


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_what_texts_begin_with_alike_is_computed_once(monkeypatch, weights):
    """Whole pages of 16 tokens of it; equal texts, and padding, altogether."""
    model, computed = build(), []
    whole = NativeRunner.hidden

    def hidden(runner, batch):
        computed.append(len(batch.tokens_N))
        return whole(runner, batch)

    monkeypatch.setattr(NativeRunner, "hidden", hidden)
    one = text(40, 1)
    texts = [
        one,
        [*one[:39], 5],  # shares two pages
        [*one[:33], *text(30, 2)],  # and so does this
        [*one[:33], *text(30, 2)],  # the same again
        [*one[:33], *text(20, 2), *text(20, 3)],  # three pages with it
        one[:20],  # a beginning of others, which is computed first
        [*one[:15], *text(9, 4)],  # nothing
        [0],
        [7],
    ]
    width = max(map(len, texts))
    tokens, positions = torch.zeros(2, len(texts), width, dtype=torch.int64)
    for row, words in enumerate(texts):
        tokens[row, : len(words)] = torch.tensor(words)
        positions[row, : len(words)] = torch.arange(len(words))
    with exact(model, weights), torch.no_grad():
        found = model.logits(model(tokens, positions, Packed()))
    # By order of computation: 20, then 40, 40, 63 and 73 tokens without what is known, 24, and the two single ones.
    assert computed == [20 + (40 - 16) + (40 - 32) + (63 - 32) + (73 - 48) + 24 + 2]
    runner = NativeRunner(model, weights)
    for row, words in enumerate(texts):
        assert torch.equal(found[row, : len(words)], logits_of(runner, words))
        for at in range(len(words), width):
            assert torch.equal(found[row, at], logits_of(runner, [0])[0])


def test_changed_weights_are_seen_and_the_model_is_itself_again_afterwards():
    model, tokens = build(), text(20)
    before = reference(model, tokens)
    with exact(model):
        first = reference(model, tokens)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        second = reference(model, tokens)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        expected = logits_of(NativeRunner(model), tokens)
        optimizer.step()
        third = reference(model, tokens)
    assert torch.equal(second, expected)
    assert torch.equal(third, logits_of(NativeRunner(model), tokens))
    assert not torch.equal(second, third)
    assert not torch.equal(first, second)
    assert "forward" not in vars(model)
    torch.testing.assert_close(first, before, rtol=1e-4, atol=1e-4)


def test_a_second_one_within_the_first_is_refused_and_leaves_the_first_as_it_is():
    model = build()
    tokens, positions = torch.tensor([text(9, 3)]), torch.arange(9)[None]
    with exact(model):
        before = model.logits(model(tokens, positions, Packed()))
        with pytest.raises(ConfigError, match="exactly already"), exact(model):
            pass
        assert torch.equal(model.logits(model(tokens, positions, Packed())), before)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_what_the_engine_samples_and_what_the_trainer_computes_differ_by_nothing(weights):
    model = build(vocab_size=320, tied=True)
    engine = Engine(NativeRunner(model, weights, threads=1), slots=7, max_tokens_per_slot=128)
    requests = [
        Request(
            str(n), text(3 + 5 * n, n), SamplingParams(max_tokens=40, seed=n, logprobs=True, ignore_eos=True)
        )
        for n in range(12)
    ]
    replies = engine.run(requests)
    with exact(model, weights), torch.no_grad():
        for request, reply in zip(requests, replies, strict=True):
            tokens = [*request.tokens, *reply.tokens]
            logits = model.logits(model(torch.tensor([tokens]), torch.arange(len(tokens))[None], Packed()))[0]
            first = len(request.tokens)
            theirs, _ = chosen(logits[first - 1 : -1], torch.tensor(reply.tokens), overwrite=False)
            assert reply.logprobs == theirs.tolist()
