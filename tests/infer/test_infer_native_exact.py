"""Within `exact` a trainer sees the engine's bits, and its gradients are torch's."""

import numpy as np
import pytest
import torch

from pensar.base.ranks import World
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.native.exact import exact
from pensar.infer.native.runner import NativeRunner
from pensar.model.attention import Packed
from pensar.text.packing import collate
from pensar.text.sample import Sample
from pensar.train.head import chosen
from pensar.train.loss import LossConfig, batch_loss, weights_of
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


def test_changed_weights_are_seen_and_the_model_is_itself_again_afterwards():
    model, tokens = build(), text(20)
    before = reference(model, tokens)
    with exact(model):
        first = reference(model, tokens)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        second = reference(model, tokens)
    assert torch.equal(second, logits_of(NativeRunner(model), tokens))
    assert not torch.equal(first, second)
    assert "forward" not in vars(model)
    torch.testing.assert_close(first, before, rtol=1e-4, atol=1e-4)


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
            # The scores are the same bits; the two logarithms of a sum are two formulas.
            torch.testing.assert_close(torch.tensor(reply.logprobs), theirs, rtol=0, atol=2e-6)
