"""Small shares of the soak and of the budgets' benchmark, and by hand what the soak has found."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.engine_budgets import Served, proposer_of
from benchmarks.engine_budgets_work import asked_of
from benchmarks.engine_budgets_work import tokenizer_of as tokenizer_of_budgets
from benchmarks.engine_soak import Soak, differences
from benchmarks.engine_soak_work import BROKEN, model_of
from pensar.infer.engine import Completion, Engine, Request, SamplingParams
from pensar.infer.native.library import available
from pensar.infer.native.runner import NativeRunner
from pensar.infer.queue import Entry, WaitingQueue
from pensar.infer.step import PAGE
from pensar.infer.torch_runner import TorchRunner
from pensar.model.qwen3 import Qwen3
from pensar.text.tokenizer import THINK, TURN_START, Tokenizer


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_an_engine_that_is_disturbed_all_the_time_does_what_it_does_alone(native: bool) -> None:
    if native and not available():
        pytest.skip("no compiler")
    work = Soak(native=native, sampled=3)
    work.run(800)
    assert work.faults == []
    counts = work.counts
    assert counts["compared"] > 60
    for name in ("aborted", "refused", "stop sentences", "ended: deadline", "ended: error", "memory refused"):
        assert counts[name] > 0, name
    assert work.engine.scheduler.num_preempted > 10


@pytest.mark.parametrize("name", ["alone", "lookup", "draft_model"])
def test_budgets_are_kept_to_the_token_with_every_form_of_answer(name: str) -> None:
    tokenizer = tokenizer_of_budgets()
    served = Served(tokenizer, asked_of(tokenizer, 60, seed=1), proposer_of(name))
    served.run()
    assert served.faults == []
    assert served.counts["stop sentences"] > 30
    assert served.counts["budgets changed"] > 3
    assert served.steps_of_sentence == served.counts["stop sentences that were answered"] > 30


def test_a_soak_would_say_so_if_a_reply_were_another_one() -> None:
    one = Completion(tokens=[1, 2], logprobs=[-1.0, -2.0], forced=[False] * 2, finish_reason="length")
    assert differences(one, one, 0.0, whole=True) == []
    other = Completion(
        tokens=[1, 3, 4], logprobs=[-1.0, -2.5, -1.0], forced=[False] * 3, finish_reason="stop"
    )
    assert differences(one, other, 0.0, whole=True) == ["tokens", "forced", "logprobs", "finish_reason"]
    assert differences(one, other, 0.6, whole=False) == ["tokens"]


# ---------------------------------------------------------------- what it has found


def request(name: str, prompt: list[int], **fields: Any) -> Request:
    return Request(name, prompt, SamplingParams(**{"max_tokens": 12, **fields}))


def finished(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.num_running or engine.num_waiting:
        for piece in engine.step():
            tokens.setdefault(piece.id, []).extend(piece.tokens)
    return tokens


def test_a_request_that_gave_way_waits_with_the_deadline_that_it_had() -> None:
    queue = WaitingQueue()
    first = Entry(request("a", [1]), np.asarray([1]), 0, deadline=5.0)
    queue.push(first)
    assert queue.remove("a") is first
    again = Entry(first.request, first.prompt, 0, deadline=5.0)
    queue.push(again)
    queue.push(Entry(request("b", [1]), np.asarray([1]), 1))
    assert queue.expired(4.9) == []
    assert queue.expired(5.0) == [again]
    assert [entry.request.id for entry in queue] == ["b"]


def test_a_deadline_that_passes_while_a_reply_waits_shows_no_token_twice(model: Qwen3) -> None:
    now = 0.0
    engine = Engine(model, clock=lambda: now)
    engine.submit(Request("a", [1, 2], SamplingParams(max_tokens=12), timeout_seconds=9.0))
    shown = [token for _ in range(4) for piece in engine.step() for token in piece.tokens]
    engine.scheduler.preempt(0)
    now = 10.0
    [last] = engine.step()
    assert (last.finish_reason, last.tokens, len(shown)) == ("deadline", [], 4)


def test_a_reply_that_ends_in_its_stop_sentence_has_no_log_probability_of_another(
    model: Qwen3, tokenizer: Tokenizer
) -> None:
    prompt = [tokenizer.special(TURN_START), *tokenizer.encode("assistant\n"), tokenizer.special(THINK)]
    asked = request("a", prompt, max_tokens=60, thinking_budget=2, logprobs=True, top_logprobs=1)
    [whole] = Engine(model, tokenizer).run([asked])
    for wait in (False, True):
        engine = Engine(model, tokenizer)
        engine.run([request("before", [7] * 30, max_tokens=60, logprobs=True)])
        engine.submit(asked)
        while not engine.rows.forced[0, len(prompt) : len(prompt) + 60].any() or not engine.num_running:
            engine.step()
        if wait:
            engine.scheduler.preempt(0)
        found = engine.abort("a")
        assert found is not None
        assert found.tokens == whole.tokens[:3]
        assert found.logprobs == pytest.approx(whole.logprobs[:3], abs=1e-6)
        assert len(found.top_logprobs) == 3


def test_a_prompt_that_was_computed_in_part_has_no_log_probabilities(model: Qwen3) -> None:
    engine = Engine(model, step_tokens=8, slots=4)
    engine.submit(request("a", list(range(1, 30)), prompt_logprobs=True))
    engine.step()
    found = engine.abort("a")
    assert found is not None
    assert found.prompt_logprobs == []


def test_likely_tokens_are_reported_once_however_often_a_reply_gives_way(
    model: Qwen3, tokenizer: Tokenizer
) -> None:
    prompt = [tokenizer.special(TURN_START), *range(1, 40), tokenizer.special(THINK)]
    asked = request("a", prompt, max_tokens=110, thinking_budget=3, top_logprobs=2)
    [whole] = Engine(model, tokenizer).run([asked])
    engine = Engine(model, tokenizer, slots=8, step_tokens=8)
    engine.submit(asked)
    done = []
    for number in range(400):
        # While its text is computed again in chunks, and while the stop sentence is.
        if engine.num_running and number in (6, 8, 10, 14, 16, 40, 42):
            engine.scheduler.preempt(0)
        done += engine.step()
    tops = [top for piece in done for top in piece.top_logprobs or ()]
    assert [token for piece in done for token in piece.tokens] == whole.tokens
    assert any(whole.forced)
    assert len(tops) == len(whole.tokens)
    for ours, theirs in zip(tops, whole.top_logprobs, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-5)


def test_a_name_that_comes_back_does_not_get_the_prompt_that_it_waited_for(model: Qwen3) -> None:
    """The second follows the first, leaves, and comes back with another prompt while that is still computed."""
    long = list(np.random.default_rng(0).integers(1, 300, 60))
    other = list(np.random.default_rng(1).integers(1, 300, 40))
    alone = finished_alone(model, other)
    engine = Engine(model, slots=8, step_tokens=16)
    engine.submit(request("first", long))
    engine.submit(request("second", long))
    engine.step()
    assert engine.rows.state["follows"][engine.rows.index["second"]]
    engine.abort("second")
    engine.submit(request("second", other))
    assert finished(engine)["second"] == alone


def finished_alone(model: Qwen3, prompt: list[int]) -> list[int]:
    return finished_of(Engine(model), request("x", prompt))


def finished_of(engine: Engine, asked: Request) -> list[int]:
    engine.submit(asked)
    return finished(engine)[asked.id]


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("place", [1, 5, PAGE, 67])
def test_a_token_that_breaks_the_text_breaks_nothing_before_it(cache: Any, place: int) -> None:
    """Log-probabilities of a prompt, of which one token is NaN, up to there: in one pass those of a token a pass."""
    if not available():
        pytest.skip("no compiler")
    prompt = np.random.default_rng(place).integers(1, 300, 80).tolist()
    prompt[place] = BROKEN
    found = []
    for step_tokens in (1, 200):
        engine = Engine(NativeRunner(model_of(0), cache=cache), slots=1, step_tokens=step_tokens)
        engine.submit(request("a", prompt, prompt_logprobs=True))
        while engine.num_running or engine.num_waiting:
            engine.step()
        found.append(engine.rows.logprobs[0, : place + 1].copy())
    # Whatever is behind it, a token is scored by those before it.
    assert np.isfinite(found[0]).all()
    assert np.array_equal(found[0], found[1])


def test_torch_says_which_request_was_broken() -> None:
    engine = Engine(TorchRunner(model_of(0)))
    bad, good = engine.run([request("bad", [1, BROKEN, 2]), request("good", [1, 2, 3])])
    assert "NaN" in str(bad.error)
    assert good.finish_reason == "length"
    assert torch.isfinite(torch.tensor(good.logprobs)).all()
