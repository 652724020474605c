from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pensar.base.errors import ModelError
from pensar.infer.beam import beam_search
from pensar.infer.choices import best, expand, mean_logprob
from pensar.infer.engine import Engine
from pensar.infer.request import Completion, Request, SamplingParams
from pensar.infer.sampling import top_logprobs
from pensar.model.attention import Packed

VOCABULARY = 40


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.4,
        use_cache=True,
    )
    return Qwen3ForCausalLM(config).eval()


class WholeTexts:
    """The engine's interface over transformers' model: every text computed anew."""

    def __init__(self, model):
        self.model = model

    def run(self, requests):
        results = []
        for request in requests:
            with torch.no_grad():
                logits = self.model(torch.tensor([request.tokens])).logits[:, -1]
            ids, values = top_logprobs(logits, request.params.top_logprobs)
            top = list(zip(ids[0].tolist(), values[0].tolist(), strict=True))
            results.append(
                Completion(
                    tokens=[top[0][0]],
                    logprobs=[top[0][1]],
                    forced=[False],
                    finish_reason="length",
                    top_logprobs=[top],
                )
            )
        return results


SHAPES = [(3, 1.0), (4, 0.0), (4, 2.0), (3, -1.0)]
RULES = [(*shape, early) for shape in SHAPES for early in (True, False, "never")]


@pytest.mark.parametrize(("num_beams", "length_penalty", "early_stopping"), [(1, 1.0, False), *RULES])
def test_beams_are_those_of_transformers(reference, num_beams, length_penalty, early_stopping):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        prompt = rng.integers(0, VOCABULARY, 5).tolist()
        ends = rng.choice(VOCABULARY, 2, replace=False).tolist()
        flags = {"length_penalty": length_penalty, "early_stopping": early_stopping} if num_beams > 1 else {}
        with torch.no_grad():
            wanted = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, 5, dtype=torch.int64),
                max_new_tokens=12,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=VOCABULARY - 1,
                output_scores=True,
                return_dict_in_generate=True,
                **flags,
            )
        found = beam_search(
            WholeTexts(reference),
            Request("r", prompt, SamplingParams(max_tokens=12)),
            num_beams=num_beams,
            end_ids=ends,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        rows = wanted.sequences[:, len(prompt) :].tolist()
        for row, beam in zip(rows, found, strict=True):
            assert row[: len(beam.tokens)] == beam.tokens
            assert set(row[len(beam.tokens) :]) <= {VOCABULARY - 1}
        if num_beams > 1:
            scores = wanted.sequences_scores.tolist()
            assert [beam.score for beam in found] == pytest.approx(scores, rel=1e-4)


def test_the_best_beam_is_likelier_than_the_greedy_reply_in_total(reference):
    engine = WholeTexts(reference)
    better = 0
    for seed in range(6):
        prompt = np.random.default_rng(seed).integers(0, VOCABULARY, 4).tolist()
        request = Request("r", prompt, SamplingParams(max_tokens=6))
        greedy = beam_search(engine, request, num_beams=1, end_ids=())[0]
        beam = beam_search(engine, request, num_beams=8, end_ids=())[0]
        assert beam.logprob >= greedy.logprob - 1e-5
        better += beam.logprob > greedy.logprob + 1e-3
    assert better


def test_an_engine_that_shares_prefixes_finds_the_beams_of_whole_forward_passes(model, tokenizer):
    class Whole(torch.nn.Module):
        def forward(self, ids):
            hidden = model(ids, torch.arange(ids.shape[1])[None], Packed())
            return SimpleNamespace(logits=model.logits(hidden))

    engine, ends = Engine(model, tokenizer), (tokenizer.eos_id, tokenizer.pad_id)
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, 256, 40).tolist()
        request = Request("r", prompt, SamplingParams(max_tokens=10))
        found = beam_search(engine, request, num_beams=4, end_ids=ends)
        wanted = beam_search(WholeTexts(Whole()), request, num_beams=4, end_ids=ends)
        assert [beam.tokens for beam in found] == [beam.tokens for beam in wanted]
        assert [beam.logprob for beam in found] == pytest.approx([beam.logprob for beam in wanted], abs=1e-3)


def test_more_beams_than_an_engine_reports_tokens_are_refused(reference):
    request = Request("r", [1], SamplingParams(max_tokens=2))
    for num_beams in (0, 20):
        with pytest.raises(ModelError, match=r"num_beams .* must be 1 to 19"):
            beam_search(WholeTexts(reference), request, num_beams=num_beams, end_ids=[3])


def reply(logprobs, forced=None, reason="stop"):
    forced = forced or [False] * len(logprobs)
    return Completion(tokens=[1] * len(logprobs), logprobs=logprobs, forced=forced, finish_reason=reason)


def test_the_best_of_several_has_the_highest_mean_of_what_it_drew_itself():
    long, short = reply([-0.5] * 10), reply([-1.0])
    forced = reply([-0.2, -50.0], [False, True])
    failed = reply([-0.0], reason="error")
    assert best([short, failed, long, forced], 3) == [forced, long, short]
    assert mean_logprob(forced) == -0.2
    assert mean_logprob(reply([])) == -np.inf


def test_choices_share_the_prompt_and_differ_in_id_and_seed_alone():
    request = Request("r", [1, 2], SamplingParams(max_tokens=4, temperature=1.0, seed=7))
    choices = expand(request, 2, 4)
    assert [choice.id for choice in choices] == ["r-0", "r-1", "r-2", "r-3"]
    assert len({choice.params.seed for choice in choices}) == 4
    assert all(choice.params.logprobs and choice.tokens == [1, 2] for choice in choices)
    assert expand(request, 2)[1].params.seed == choices[1].params.seed
    assert not expand(request, 2)[0].params.logprobs
    for n, best_of in ((0, None), (3, 2), (1, 1000)):
        with pytest.raises(ModelError, match="best_of"):
            expand(request, n, best_of)
    with pytest.raises(ModelError, match="temperature 0"):
        expand(Request("r", [1], SamplingParams(max_tokens=1)), 1, 2)
