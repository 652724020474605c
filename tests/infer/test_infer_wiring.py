"""Constraints, stop strings and grammars inside the running engine, with chunks, preemption and budgets around them."""

import json
from typing import Any

import pytest

from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.request import Grammar
from pensar.infer.step import PAGE
from pensar.text.tokenizer import THINK, StreamDecoder


def free(model: Any, tokenizer: Any, prompt: list[int], **params: Any) -> Any:
    wanted = {"max_tokens": 60, "ignore_eos": True} | params
    return Engine(model, tokenizer).run([Request("free", prompt, SamplingParams(**wanted))])[0]


def test_a_stop_string_ends_a_reply_and_is_never_shown_in_part(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer.encode("the cat sat")
    text = tokenizer.decode(free(model, tokenizer, prompt).tokens, skip_special=True)
    stop = text[20:23]
    begin = text.index(stop)
    engine = Engine(model, tokenizer)
    engine.submit(
        Request("a", prompt, SamplingParams(max_tokens=60, ignore_eos=True, stop=(stop, "never in it")))
    )
    decoder, shown, last = StreamDecoder(tokenizer, skip_special=True), "", None
    while engine.num_running or engine.num_waiting:
        for piece in engine.step():
            new = decoder.feed(piece.tokens)
            if piece.finish_reason is None:
                shown += new
                assert len(shown) <= begin
            last = piece
    assert last is not None
    assert (last.finish_reason, last.stopped_at) == ("stop", begin)


def test_a_preempted_reply_remembers_its_constraint_and_its_stops(model: Any, tokenizer: Any) -> None:
    prompts = [tokenizer.encode(text) for text in ("the cat sat", "one and two are", "considering")]
    wanted = {
        "max_tokens": 70,
        "ignore_eos": True,
        "temperature": 1.0,
        "frequency_penalty": 1.5,
        "stop": ("@@@",),
    }
    requests = [Request(str(i), p, SamplingParams(seed=i, **wanted)) for i, p in enumerate(prompts)]
    roomy = Engine(model.double(), tokenizer, slots=3).run(requests)
    engine = Engine(model, tokenizer, slots=3, cache_tokens=8 * PAGE)
    tight = engine.run(requests)
    assert engine.scheduler.num_preempted > 0
    assert [one.tokens for one in roomy] == [two.tokens for two in tight]


def test_a_grammar_begins_after_a_thinking_that_its_budget_ends(model: Any, tokenizer: Any) -> None:
    prompt = [*tokenizer.encode("the cat"), tokenizer.special(THINK)]
    grammar = Grammar(kind="choice", text=json.dumps(["red", "green"]))
    for budget in (0, 3, 9):
        done = free(
            model, tokenizer, prompt, thinking_budget=budget, grammar=grammar, ignore_eos=False, max_tokens=90,
            temperature=1.0, logprobs=True,
        )  # fmt: skip
        answer = tokenizer.decode(done.tokens, skip_special=True).split("</think>")[-1].strip("\n")
        assert answer in ("red", "green")
        assert done.num_reasoning_tokens <= budget
        assert done.finish_reason == "stop"
        assert len(done.logprobs) == len(done.tokens)


def test_a_request_that_leaves_nothing_to_say_fails_alone(model: Any, tokenizer: Any) -> None:
    grammar = Grammar(kind="regex", text="a+")
    dead = SamplingParams(max_tokens=5, grammar=grammar, bad_ids=tuple(range(320)))
    fine = SamplingParams(max_tokens=5)
    failed, other = Engine(model, tokenizer).run(
        [Request("dead", [1, 2], dead), Request("fine", tokenizer.encode("the cat"), fine)]
    )
    assert failed.finish_reason == "error"
    assert "leave no token to draw" in str(failed.error)
    assert other.error is None
    broken = SamplingParams(max_tokens=5, grammar=Grammar(kind="regex", text="("))
    [refused] = Engine(model, tokenizer).run([Request("broken", [1], broken)])
    assert "request broken" in str(refused.error)


@pytest.mark.parametrize("field", ["stop", "grammar"])
def test_what_needs_a_tokenizer_says_so(model: Any, field: str) -> None:
    value: Any = ("x",) if field == "stop" else Grammar(kind="json_object")
    [refused] = Engine(model).run([Request("a", [1], SamplingParams(max_tokens=2, **{field: value}))])
    assert "with a tokenizer" in str(refused.error)
