import numpy as np
import pytest
import torch

from pensar.base.errors import ConfigError, ModelError
from pensar.infer.engine import Engine, Request, SamplingParams


def prompts(lengths, seed=0, vocab=256):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def greedy(name, tokens, max_tokens=20, **more):
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens, **more))


def collect(engine, log, until=lambda engine: not (engine.num_running or engine.num_waiting)):
    while True:
        for piece in engine.step():
            entry = log.setdefault(piece.id, {"tokens": [], "logprobs": [], "finish": None, "reasoning": 0})
            entry["tokens"] += piece.tokens
            entry["logprobs"] += piece.logprobs or []
            entry["finish"] = piece.finish_reason
            entry["reasoning"] = piece.reasoning_tokens
        if until(engine):
            return log


def test_greedy_tokens_equal_a_naive_generation_for_prompts_of_mixed_lengths(model, naive):
    asked = prompts([1, 3, 90, 17, 4, 60, 33])
    limits = [5, 40, 20, 1, 70, 13, 30]
    completions = Engine(model, slots=4).run(
        [greedy(str(i), p, n) for i, (p, n) in enumerate(zip(asked, limits, strict=True))]
    )
    for prompt, limit, completion in zip(asked, limits, completions, strict=True):
        expected = naive(model, prompt, limit)
        assert completion.tokens == expected["tokens"]
        assert completion.finish_reason == "length"
        assert completion.forced == [False] * limit


def test_a_mixture_of_experts_gives_the_same_tokens_as_a_naive_generation(make_model, naive):
    model = make_model(
        num_experts=4, experts_per_token=2, moe_intermediate_size=16, intermediate_size=0, tied=True
    )
    for prompt, completion in zip(
        asked := prompts([5, 9, 30]),
        Engine(model).run([greedy(str(i), p) for i, p in enumerate(asked)]),
        strict=True,
    ):
        assert completion.tokens == naive(model, prompt, 20)["tokens"]


def test_requests_that_arrive_while_others_run_change_nothing(model, naive):
    engine, log, asked = Engine(model, slots=3), {}, prompts([7, 30, 2, 12, 50])
    for step, prompt in enumerate(asked):
        engine.submit(greedy(str(step), prompt, 10 + 5 * step))
        if step < 4:
            collect(engine, log, until=lambda engine: True)
            collect(engine, log, until=lambda engine: True)
    collect(engine, log)
    for step, prompt in enumerate(asked):
        assert log[str(step)]["tokens"] == naive(model, prompt, 10 + 5 * step)["tokens"]
        assert log[str(step)]["finish"] == "length"


def test_equal_prompts_are_computed_once_and_each_gets_its_own_draws(model, full_logprobs):
    [prompt, other] = prompts([20, 20])
    engine = Engine(model, slots=16)
    computed = []
    run = engine.runner.run
    engine.runner.run = lambda batch: (computed.append(len(batch.tokens_N)), run(batch))[1]
    requests = [
        Request(
            f"{i}",
            prompt if i % 2 else other,
            SamplingParams(max_tokens=12, temperature=1.0, seed=i, logprobs=True),
        )
        for i in range(12)
    ]
    completions = engine.run(requests)
    assert computed == [2 * 20, *[12] * 11]
    assert len({tuple(completion.tokens) for completion in completions}) == 12
    for request, completion in zip(requests, completions, strict=True):
        expected = full_logprobs(model, request.tokens, completion.tokens)
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_an_aborted_request_returns_its_tokens_and_leaves_the_others_alone(model, naive):
    engine, log, asked = Engine(model, slots=2), {}, prompts([8, 25, 3])
    for index, prompt in enumerate(asked):
        engine.submit(greedy(str(index), prompt, 30))
    for _ in range(6):
        collect(engine, log, until=lambda engine: True)
    aborted = engine.abort("0")
    assert aborted.finish_reason == "abort"
    assert aborted.tokens == naive(model, asked[0], 6)["tokens"]
    assert engine.abort("0") is None
    collect(engine, log)
    for name in (1, 2):
        assert log[str(name)]["tokens"] == naive(model, asked[name], 30)["tokens"]
    engine.submit(greedy("w", asked[0], 3))
    assert engine.abort("w").tokens == []
    assert engine.step() == []


def test_a_reply_ends_with_a_stop_token_which_it_includes(model, tokenizer, naive):
    [prompt] = prompts([9])
    free = naive(model, prompt, 30)["tokens"]
    stop = free[7]
    end = free.index(stop) + 1
    [completion] = Engine(model).run([greedy("a", prompt, 30, stop_ids=(stop,))])
    assert completion.tokens == free[:end]
    assert completion.finish_reason == "stop"


def test_the_tokenizers_end_of_turn_ends_a_reply(make_model, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_id] = 1.0
        model.model.norm.weight.fill_(1.0)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
    [completion] = Engine(model, tokenizer).run([greedy("a", [1, 2], 5)])
    assert completion.tokens == [tokenizer.eos_id]
    assert completion.finish_reason == "stop"


def test_a_sampled_reply_does_not_depend_on_its_neighbours(model):
    asked = prompts([6, 40, 11, 3, 25, 8])
    styles = [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 30, "top_p": 0.9},
        {"temperature": 0.0},
    ]
    requests = [
        Request(str(i), p, SamplingParams(**{"max_tokens": 15, "temperature": 0.7, "seed": i, **style}))
        for i, (p, style) in enumerate(zip(asked, styles, strict=True))
    ]
    together = Engine(model).run(requests)
    alone = [Engine(model).run([request])[0] for request in requests]
    queued = Engine(model, slots=2).run(requests[::-1])[::-1]
    assert [c.tokens for c in together] == [c.tokens for c in alone] == [c.tokens for c in queued]


def test_reported_logprobs_are_those_of_the_model_at_temperature_one_without_filters(model, full_logprobs):
    asked = prompts([4, 30, 9])
    requests = [
        Request(str(i), p, SamplingParams(max_tokens=25, seed=i, logprobs=True, **style))
        for i, (p, style) in enumerate(
            zip(asked, [{"temperature": 1.0}, {"temperature": 0.5, "top_k": 3}, {}], strict=True)
        )
    ]
    for batch in (requests, requests[:1], requests[2:]):
        for request, completion in zip(batch, Engine(model).run(batch), strict=True):
            expected = full_logprobs(model, request.tokens, completion.tokens)
            assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_steps_report_every_token_once_with_logprobs_only_where_asked(model):
    asked = prompts([4, 9])
    engine, log = Engine(model), {}
    engine.submit(greedy("a", asked[0], 7, logprobs=True))
    engine.submit(greedy("b", asked[1], 4))
    collect(engine, log)
    [first, second] = Engine(model).run([greedy("a", asked[0], 7, logprobs=True), greedy("b", asked[1], 4)])
    assert log["a"]["tokens"] == first.tokens
    assert log["a"]["logprobs"] == first.logprobs
    assert len(first.logprobs) == 7
    assert log["b"] == {"tokens": second.tokens, "logprobs": [], "finish": "length", "reasoning": 0}
    assert second.logprobs == []


def test_new_weights_take_effect_at_the_next_token_as_if_the_cache_were_theirs(make_model, naive):
    model, other = make_model(0), make_model(1)
    asked = prompts([5, 60, 21])
    engine, log = Engine(model), {}
    for index, prompt in enumerate(asked):
        engine.submit(greedy(str(index), prompt, 25))
    for _ in range(10):
        collect(engine, log, until=lambda engine: True)
    before = {name: list(entry["tokens"]) for name, entry in log.items()}
    engine.load(other.state_dict())
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)
    collect(engine, log)
    for index, prompt in enumerate(asked):
        old = before[str(index)]
        assert len(old) == 10
        assert log[str(index)]["tokens"] == old + naive(other, [*prompt, *old], 15)["tokens"]


def test_weights_of_another_shape_are_refused_before_anything_changes(make_model):
    model = make_model()
    kept = model.lm_head.weight.clone()
    with pytest.raises(ModelError, match="lm_head"):
        Engine(model).load(make_model(1, tied=True))
    with pytest.raises(ModelError, match=r"\[96, 32\].*\[64, 32\]"):
        Engine(model).load(make_model(1, intermediate_size=96))
    assert torch.equal(model.lm_head.weight, kept)


def test_a_model_in_training_is_left_in_training(model):
    model.train()
    engine = Engine(model)
    engine.run([greedy("a", [1, 2, 3], 2)])
    assert model.training
    loss = model.logits(model(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), lambda layer, q, k, v: q)).sum()
    loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(
    ("tokens", "params", "words"),
    [
        ([], {}, "empty"),
        ([1, 320], {}, "token 320 at position 1.*0 to 319"),
        ([-1, 5], {}, "token -1 at position 0"),
        ([0.5], {}, "float64"),
        ([[1, 2]], {}, "2 dimensions"),
        ([1] * 250, {"max_tokens": 10}, "260 positions.*limit is 256"),
        ([1], {"max_tokens": 0}, "max_tokens 0; it must be at least 1"),
        ([1], {"thinking_budget": -1}, "thinking_budget -1"),
        ([1], {"temperature": -0.1}, "temperature -0.1"),
        ([1], {"temperature": float("nan")}, "temperature nan"),
        ([1], {"temperature": float("inf")}, "temperature inf"),
        ([1], {"top_p": 1.5}, "top_p 1.5; it must be at least 0 and at most 1"),
        ([1], {"top_k": -1}, "top_k -1"),
        ([1], {"min_p": 2.0}, "min_p 2.0"),
        ([1], {"seed": -3}, "seed -3"),
        ([1], {"stop_ids": (400,)}, "stop_ids 400"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_alone(model, tokenizer, naive, tokens, params, words):
    bad = Request("bad", tokens, SamplingParams(**{"max_tokens": 4, **params}))
    engine = Engine(model, tokenizer)
    with pytest.raises(ModelError, match=words):
        engine.submit(bad)
    [failed, fine] = engine.run([bad, greedy("good", [1, 2, 3], 4)])
    assert failed.finish_reason == "error"
    assert "bad" in failed.error
    assert failed.tokens == []
    assert fine.tokens == naive(model, [1, 2, 3], 4, stops=(tokenizer.eos_id, tokenizer.pad_id))["tokens"]


def test_an_id_is_free_again_once_its_request_has_ended(model):
    engine = Engine(model)
    engine.submit(greedy("a", [1], 2))
    with pytest.raises(ModelError, match="'a' is in use"):
        engine.submit(greedy("a", [1], 2))
    assert [c.finish_reason for c in engine.run([greedy("b", [1], 9), greedy("b", [1], 2)])] == [
        "length",
        "error",
    ]
    [piece] = engine.step()
    assert (piece.id, piece.finish_reason, len(piece.tokens)) == ("a", "length", 2)
    engine.submit(greedy("a", [1], 2))


def test_nan_logits_fail_their_request_only_and_do_not_outlive_it(make_model, naive):
    model = make_model()
    asked = prompts([30, 5, 8, 4], vocab=100)
    clean = [naive(model, prompt, 60)["tokens"] for prompt in asked]
    used = {token for tokens in (*asked, *clean) for token in tokens}
    poison = next(token for token in range(320) if token not in used)
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.nan
    engine = Engine(model, slots=3)
    bad = greedy("bad", [*asked[0], poison], 30, logprobs=True)
    completions = engine.run([bad, *(greedy(str(i), p, 60) for i, p in enumerate(asked[1:]))])
    assert completions[0].finish_reason == "error"
    assert "NaN" in completions[0].error
    assert completions[0].tokens == []
    assert [c.tokens for c in completions[1:]] == clean[1:]


def test_a_reply_that_meets_nan_midway_keeps_what_it_had(make_model, naive):
    model = make_model()
    asked = prompts([6, 7])
    first, second = (naive(model, prompt, 12)["tokens"] for prompt in asked)
    poison = next(token for token in first if token not in (*second, *asked[0], *asked[1]))
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.nan
    [failed, fine] = Engine(model).run([greedy(str(i), p, 12) for i, p in enumerate(asked)])
    assert failed.tokens == first[: first.index(poison) + 1]
    assert failed.finish_reason == "error"
    assert fine.tokens == second


@pytest.mark.parametrize("room", [4, 7, 64])
def test_prompts_are_computed_in_chunks_beside_running_replies(make_model, naive, room):
    model = make_model()
    asked = prompts([50, 40, 100, 3])
    engine, log, sizes = Engine(model, slots=4, step_tokens=room), {}, []
    run = engine.runner.run
    engine.runner.run = lambda batch: (sizes.append(len(batch.tokens_N)), run(batch))[1]
    for index, prompt in enumerate(asked):
        engine.submit(greedy(str(index), prompt, 8))
    collect(engine, log, until=lambda engine: True)
    engine.load(model)
    collect(engine, log)
    assert max(sizes) == room
    assert [log[str(i)]["tokens"] for i in range(4)] == [naive(model, p, 8)["tokens"] for p in asked]


def test_an_engine_without_slots_or_with_a_foreign_tokenizer_is_refused(make_model, tokenizer):
    with pytest.raises(ConfigError, match="slots is 0"):
        Engine(make_model(), slots=0)
    with pytest.raises(ModelError, match="embeddings"):
        Engine(make_model(vocab_size=100), tokenizer)
    assert Engine(make_model(), max_tokens_per_slot=50).max_positions == 50


def test_greedy_tokens_equal_those_of_transformers(make_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    from pensar.model.weights import save_model

    model = make_model()
    save_model(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    asked = prompts([5, 18])
    completions = Engine(model).run([greedy(str(i), p, 24) for i, p in enumerate(asked)])
    for prompt, completion in zip(asked, completions, strict=True):
        ids = torch.tensor([prompt])
        config = transformers.GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0)
        expected = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert completion.tokens == expected[0, len(prompt) :].tolist()
