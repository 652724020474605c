"""Scheduling: who runs when, what is shared, and that no choice of it changes a reply."""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pensar.base.errors import ConfigError, ModelError
from pensar.infer.engine import Completion, Engine, Piece, Request, SamplingParams
from pensar.infer.queue import Entry, WaitingQueue
from pensar.infer.step import PAGE, StepBatch, StepOutput
from pensar.infer.torch_runner import TorchRunner
from pensar.model.qwen3 import Qwen3

Naive = Callable[..., dict[str, Any]]


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length).tolist() for length in lengths]


def greedy(name: str, tokens: list[int], max_tokens: int = 20, **more: Any) -> Request:
    fields = {key: more.pop(key) for key in list(more) if key in Request.__struct_fields__}
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens, **more), **fields)


def finished(engine: Engine) -> dict[str, list[Piece]]:
    """Every request's pieces, to the end."""
    pieces: dict[str, list[Piece]] = {}
    while engine.num_running or engine.num_waiting:
        for piece in engine.step():
            pieces.setdefault(piece.id, []).append(piece)
        engine.pool.check()
    for piece in engine.step():
        pieces.setdefault(piece.id, []).append(piece)
    return pieces


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


@pytest.fixture
def clock() -> Iterator[list[float]]:
    return [0.0]


# ---------------------------------------------------------------- pages


def test_a_cache_too_small_for_all_preempts_and_nothing_changes(model: Qwen3, naive: Naive) -> None:
    asked = prompts([30, 45, 20, 60, 10])
    engine = Engine(model, slots=5, cache_tokens=9 * PAGE, step_tokens=32)
    done = engine.run([greedy(str(i), p, 50) for i, p in enumerate(asked)])
    assert engine.scheduler.num_preempted > 0
    for prompt, completion in zip(asked, done, strict=True):
        assert completion.tokens == naive(model, prompt, 50)["tokens"]
    assert engine.pool.num_held == 0


def test_preempted_replies_keep_seeds_logprobs_and_budgets(
    model: Qwen3, tokenizer: Any, full_logprobs: Any
) -> None:
    from pensar.text.tokenizer import THINK

    opened = [tokenizer.special(THINK)]
    asked = [[*opened, *prompt] for prompt in prompts([20, 30, 25])]
    wanted = {
        "temperature": 1.0,
        "logprobs": True,
        "prompt_logprobs": True,
        "top_logprobs": 3,
        "thinking_budget": 12,
    }
    requests = [greedy(str(i), p, 60, seed=i, **wanted) for i, p in enumerate(asked)]
    roomy = Engine(model, tokenizer, slots=3).run(requests)
    engine = Engine(model, tokenizer, slots=3, cache_tokens=9 * PAGE)
    tight = engine.run(requests)
    assert engine.scheduler.num_preempted > 0
    for prompt, one, two in zip(asked, roomy, tight, strict=True):
        assert (one.tokens, one.forced, one.num_reasoning_tokens) == (
            two.tokens,
            two.forced,
            two.num_reasoning_tokens,
        )
        assert any(one.forced)
        assert two.logprobs == pytest.approx(full_logprobs(model, prompt, two.tokens), abs=1e-5)
        for name in ("top_logprobs", "prompt_top_logprobs"):
            places, others = getattr(one, name), getattr(two, name)
            assert len(others) == len(two.tokens if name == "top_logprobs" else prompt)
            assert [[token for token, _ in top] for top in places] == [
                [token for token, _ in top] for top in others
            ]


def test_a_request_that_the_cache_can_never_hold_is_refused(model: Qwen3) -> None:
    engine = Engine(model, cache_tokens=4 * PAGE)
    [failed, fine] = engine.run([greedy("a", prompts([60])[0], 5), greedy("b", prompts([59])[0], 5)])
    assert "needs 65 tokens of cache, there is room for 64" in str(failed.error)
    assert len(fine.tokens) == 5
    with pytest.raises(ConfigError, match="cache_tokens 3 needs"):
        Engine(model, cache_tokens=3)
    with pytest.raises(ConfigError, match="step_tokens 2 is less than slots 3"):
        Engine(model, slots=3, step_tokens=2)


def test_a_known_beginning_is_not_computed_again(model: Qwen3, naive: Naive) -> None:
    [shared, first, second] = prompts([50, 7, 9])
    engine = Engine(model)
    computed: list[int] = []
    run = engine.runner.run
    engine.runner.run = lambda batch: (computed.append(len(batch.tokens_N)), run(batch))[1]  # type: ignore[method-assign]
    engine.run([greedy("a", shared + first, 4)])
    [again] = engine.run([greedy("b", shared + second, 4)])
    assert again.num_cached_tokens == 48
    assert again.tokens == naive(model, shared + second, 4)["tokens"]
    assert computed == [57, 1, 1, 1, 59 - 48, 1, 1, 1]
    # The next turn of a talk begins with the last one's reply as well.
    talk = shared + second + again.tokens
    [turn] = engine.run([greedy("c", [*talk, 1, 2], 3)])
    assert turn.num_cached_tokens == (len(talk) - 1) // PAGE * PAGE
    # The same text whole: at least its last token is computed.
    even = shared[:48]
    [whole] = engine.run([greedy("d", even, 3)])
    assert (whole.num_cached_tokens, whole.tokens) == (32, naive(model, even, 3)["tokens"])
    for salt, share, cached in (("other", True, 0), ("", False, 0)):
        engine.scheduler.share = share
        [apart] = engine.run([greedy("e", shared + first, 3, salt=salt)])
        assert apart.num_cached_tokens == cached


def test_new_weights_share_nothing_with_the_old(make_model: Callable[..., Qwen3], naive: Naive) -> None:
    model, other = make_model(0), make_model(1)
    [prompt] = prompts([40])
    engine = Engine(model)
    engine.run([greedy("a", prompt, 3)])
    engine.load(other)
    [completion] = engine.run([greedy("b", prompt, 9)])
    assert completion.num_cached_tokens == 0
    assert completion.tokens == naive(other, prompt, 9)["tokens"]


def test_weights_can_change_under_running_replies_which_keep_their_cache(
    make_model: Callable[..., Qwen3],
) -> None:
    """Tokens say which weights they are of; what the old ones computed is used on."""
    engine, other = Engine(TorchRunner(make_model(0))), make_model(1)
    [prompt] = prompts([40])
    engine.submit(greedy("a", prompt, 8))
    pieces = engine.step() + engine.step()
    keys = engine.runner.keys[0].clone()  # type: ignore[attr-defined]
    engine.load(other, recompute=False)
    for _ in range(6):
        pieces += engine.step()
    assert [piece.version for piece in pieces] == [0, 0, *[1] * 6]
    page = engine.runner.keys[0].shape[1] - 1  # type: ignore[attr-defined]
    assert page >= 1
    assert torch.equal(engine.runner.keys[0][:, 1], keys[:, 1])  # type: ignore[attr-defined]


def test_equal_prompts_share_pages_and_write_into_copies(model: Qwen3) -> None:
    [prompt] = prompts([40])
    engine = Engine(model, slots=8)
    for i in range(8):
        engine.submit(greedy(str(i), prompt, 30, temperature=1.0, seed=i))
    engine.step()
    held = engine.rows.pages[:8, :3]
    assert (held[:, :2] == held[0, :2]).all(), "the full pages are one"
    assert len(set(held[:, 2].tolist())) == 8, "the page that grows is each one's own"
    assert engine.pool.num_held == 2 + 8
    alone = Engine(model).run([greedy("5", prompt, 30, temperature=1.0, seed=5)])[0]
    assert tokens_of(finished(engine)["5"]) == alone.tokens[1:]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_followers_survive_their_leader(model: Qwen3, naive: Naive, steps: int) -> None:
    [prompt] = prompts([50])
    engine = Engine(model, slots=4, step_tokens=16)
    for i in range(4):
        engine.submit(greedy(str(i), prompt, 6))
    for _ in range(steps):
        engine.step()
    engine.abort("0")
    if steps == 2:
        engine.abort("1")
    done = finished(engine)
    for name, pieces in done.items():
        assert tokens_of(pieces) == naive(model, prompt, 6)["tokens"], name
    assert set(done) == ({"1", "2", "3"} if steps < 2 else {"2", "3"})


def test_a_running_reply_to_the_same_prompt_does_not_take_the_lead(model: Qwen3, naive: Naive) -> None:
    """Whoever has the prompt in the cache already leads nobody: the followers' leader is the one that computes it."""
    [prompt] = prompts([50])
    engine = Engine(model, slots=4, step_tokens=20, share=False)
    engine.submit(greedy("old", prompt, 30))
    for _ in range(5):
        engine.step()
    for name in ("leader", "follower"):
        engine.submit(greedy(name, prompt, 6))
    done = finished(engine)
    assert tokens_of(done["leader"]) == tokens_of(done["follower"]) == naive(model, prompt, 6)["tokens"]


def test_a_prompt_that_is_scored_neither_leads_nor_follows(model: Qwen3, naive: Naive) -> None:
    [prompt] = prompts([50])
    engine = Engine(model, slots=4, step_tokens=20)
    engine.submit(greedy("leader", prompt, 6))
    engine.step()
    engine.submit(greedy("scored", prompt, 6, prompt_logprobs=True))
    engine.submit(greedy("follower", prompt, 6))
    expected = naive(model, prompt, 6)["tokens"]
    assert {name: tokens_of(pieces) for name, pieces in finished(engine).items()} == dict.fromkeys(
        ("leader", "scored", "follower"), expected
    )


# ---------------------------------------------------------------- who is next


def test_priorities_go_first_and_take_running_slots(model: Qwen3, naive: Naive) -> None:
    asked = prompts([5, 6, 7])
    engine = Engine(model, slots=1)
    engine.submit(greedy("late", asked[0], 10, priority=5))
    engine.step()
    engine.submit(greedy("later", asked[1], 3, priority=9))
    engine.submit(greedy("urgent", asked[2], 3, priority=-1))
    order = []
    while engine.num_running or engine.num_waiting:
        order += [piece.id for piece in engine.step() if piece.finish_reason]
    assert order == ["urgent", "late", "later"]


def test_users_get_equal_shares_however_much_one_asks_for(model: Qwen3) -> None:
    engine = Engine(model, slots=2)
    for i in range(20):
        engine.submit(greedy(f"greedy-{i}", prompts([8], i)[0], 8, user="greedy"))
    for _ in range(30):
        engine.step()
    for i in range(4):
        engine.submit(greedy(f"modest-{i}", prompts([8], 90 + i)[0], 8, user="modest"))
    order = []
    while engine.num_running or engine.num_waiting:
        order += [piece.id for piece in engine.step() if piece.finish_reason]
    places = [place for place, name in enumerate(order) if name.startswith("modest")]
    assert places[-1] <= 9, f"four requests of a user who waited less were served at {places}"


def test_the_queue_lifts_a_user_who_comes_back() -> None:
    def entry(name: str, user: str, arrival: int) -> Entry:
        return Entry(greedy(name, [1], 1, user=user), np.asarray([1]), arrival)

    queue = WaitingQueue()
    queue.push(entry("a1", "a", 0))
    queue.charge(np.asarray([queue.number("a")]), np.asarray([100.0]))
    queue.push(entry("b1", "b", 1))
    assert queue.served("b") == 100.0, "being away earns nothing"
    queue.charge(np.asarray([queue.number("b"), queue.number("b")]), np.asarray([1.0, 2.0]))
    queue.push(entry("a2", "a", 2))
    assert queue.served("b") == 103.0
    names = []
    while (head := queue.first()) is not None:
        names.append(queue.remove(head.request.id).request.id)
    assert names == ["a1", "a2", "b1"]


def test_a_deadline_ends_a_request_where_it_stands(model: Qwen3, naive: Naive, clock: list[float]) -> None:
    asked = prompts([5, 6])
    engine = Engine(model, slots=1, clock=lambda: clock[0])
    engine.submit(greedy("runs", asked[0], 50, timeout_seconds=3.0))
    pieces = engine.step()
    engine.submit(greedy("waits", asked[1], 50, timeout_seconds=2.0))
    for now in (1.0, 2.5, 3.5):
        clock[0] = now
        pieces += engine.step()
    ends = {piece.id: piece.finish_reason for piece in pieces if piece.finish_reason}
    assert ends == {"waits": "deadline", "runs": "deadline"}
    assert tokens_of([piece for piece in pieces if piece.id == "runs"]) == naive(model, asked[0], 3)["tokens"]
    assert (engine.num_running, engine.num_waiting, engine.pool.num_held) == (0, 0, 0)
    with pytest.raises(ModelError, match=r"timeout_seconds 0.0; it must be above 0"):
        engine.submit(greedy("never", [1], 1, timeout_seconds=0.0))


# ---------------------------------------------------------------- what is reported


def test_log_probabilities_of_a_prompt_and_of_the_likeliest(model: Qwen3, full_logprobs: Any) -> None:
    asked = prompts([37, 5])
    engine = Engine(model, step_tokens=64)
    engine.run([greedy("warm", asked[0], 1)])
    wanted = {"prompt_logprobs": True, "logprobs": True, "top_logprobs": 4}
    done = engine.run([greedy(str(i), p, 6, **wanted) for i, p in enumerate(asked)])
    for prompt, completion in zip(asked, done, strict=True):
        expected = full_logprobs(model, prompt[:1], prompt[1:])
        assert completion.prompt_logprobs == pytest.approx([0.0, *expected], abs=1e-5)
        assert [top[0][0] for top in completion.top_logprobs] == completion.tokens, "greedy takes the first"
        assert [top[0][1] for top in completion.top_logprobs] == pytest.approx(completion.logprobs, abs=1e-6)
        assert all(
            len(top) == 4 and sorted(top, key=lambda t: -t[1]) == top for top in completion.top_logprobs
        )
        assert completion.prompt_top_logprobs[0] == []
        assert len(completion.prompt_top_logprobs) == len(prompt)
        for place, top in enumerate(completion.prompt_top_logprobs[1:], 1):
            (best,) = full_logprobs(model, prompt[:place], [top[0][0]])
            assert top[0][1] == pytest.approx(best, abs=1e-5)
            assert len(top) == 4
            assert top[0][1] >= completion.prompt_logprobs[place]
    with pytest.raises(ModelError, match="top_logprobs 21; it must be at least 0 and at most 20"):
        engine.submit(greedy("many", [1], 1, top_logprobs=21))
    engine.submit(greedy("stream", asked[0], 3, **wanted))
    pieces = finished(engine)["stream"]
    assert [piece.prompt_logprobs is not None for piece in pieces] == [True, False, False]
    assert [piece.prompt_top_logprobs is not None for piece in pieces] == [True, False, False]


def test_prompts_that_are_scored_share_what_a_step_has_for_logits(
    model: Qwen3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pensar.infer.scheduler.MAX_LOGITS", 20 * model.config.vocab_size)
    engine, most = Engine(model, slots=8), []
    run = engine.runner.run

    def watched(batch: StepBatch) -> StepOutput:
        most.append(len(batch.wanted_S))
        return run(batch)

    engine.runner.run = watched  # type: ignore[method-assign]
    asked = prompts([16] * 6)
    done = engine.run([greedy(str(i), p, 2, prompt_logprobs=True) for i, p in enumerate(asked)])
    assert max(most) <= 20 + 6, "and one for each row that writes already"
    alone = [Engine(model).run([greedy("a", p, 2, prompt_logprobs=True)])[0] for p in asked]
    for one, other in zip(done, alone, strict=True):
        assert one.tokens == other.tokens
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-5)


def test_weights_that_come_in_the_middle_of_a_prompt_score_all_of_it(model: Qwen3) -> None:
    (prompt,) = prompts([48])
    wanted = {"prompt_logprobs": True, "top_logprobs": 2}
    other = {name: 1.5 * weight.detach() for name, weight in model.named_parameters()}
    engine = Engine(model, step_tokens=64, slots=1)
    engine.scheduler.step_tokens = 16
    engine.submit(greedy("a", prompt, 2, **wanted))
    engine.step()
    engine.step()
    engine.load(other)
    first = finished(engine)["a"][0]
    (fresh,) = Engine(model).run([greedy("a", prompt, 2, **wanted)])
    assert first.prompt_logprobs == pytest.approx(fresh.prompt_logprobs, abs=1e-5)
    for places, others in zip(first.prompt_top_logprobs, fresh.prompt_top_logprobs, strict=True):
        assert [token for token, _ in places] == [token for token, _ in others]


def test_ignoring_the_end_of_turn_goes_on_to_the_limit(model: Qwen3, tokenizer: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_id] *= 50  # type: ignore[union-attr]
    [prompt] = prompts([9])
    stopped, on = Engine(model, tokenizer).run(
        [greedy("a", prompt, 40), greedy("b", prompt, 40, ignore_eos=True)]
    )
    assert stopped.finish_reason == "stop"
    assert (on.finish_reason, len(on.tokens)) == ("length", 40)


def test_memory_that_runs_out_costs_only_what_is_too_large(model: Qwen3, naive: Naive) -> None:
    asked = prompts([100, 12, 9, 30])
    engine = Engine(model)
    run = engine.runner.run

    def small(batch: Any) -> Any:
        if len(batch.tokens_N) > 50:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
        return run(batch)

    engine.runner.run = small  # type: ignore[method-assign]
    done = engine.run([greedy(str(i), p, 8) for i, p in enumerate(asked)])
    assert done[0].finish_reason == "error"
    assert "no memory to compute 100 tokens of request 0" in str(done[0].error)
    for prompt, completion in zip(asked[1:], done[1:], strict=True):
        assert completion.tokens == naive(model, prompt, 8)["tokens"]

    def broken(batch: Any) -> Any:
        raise RuntimeError("another fault")

    engine.runner.run = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="another fault"):
        engine.run([greedy("x", asked[1], 8)])
    assert engine.pool.num_held == 0


# ---------------------------------------------------------------- everything at once


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_random_loads_leak_nothing_and_change_no_reply(make_model: Any, seed: int) -> None:
    """Arrivals, aborts, priorities, shared beginnings and too few pages: every reply is the one it is alone.

    In float64: a draw may lie between two tokens as closely as float32 rounds.
    """
    random = Random(seed)
    model = make_model().double()
    engine = Engine(
        model,
        slots=random.randint(1, 5),
        cache_tokens=PAGE * random.randint(7, 20),
        step_tokens=random.choice([5, 16, 64]),
        share=random.random() < 0.8,
    )
    beginnings = prompts([0, 20, 33], 1)
    requests = []
    for number in range(14):
        tokens = beginnings[random.randrange(3)] + prompts([random.randint(1, 12)], random.randrange(4))[0]
        requests.append(
            greedy(
                str(number), tokens, random.randint(1, 30), priority=random.randrange(2), user=random.choice("ab"),
                temperature=random.choice([0.0, 1.0]), seed=number % 3,
            )
        )  # fmt: skip
    log: dict[str, list[int]] = {}
    aborted: dict[str, Completion] = {}
    waiting = list(requests)
    while waiting or engine.num_running or engine.num_waiting:
        for _ in range(random.randint(0, 3)):
            if waiting:
                engine.submit(waiting.pop())
        if random.random() < 0.1:
            name = str(random.randrange(14))
            if (completion := engine.abort(name)) is not None:
                aborted[name] = completion
        for piece in engine.step():
            log.setdefault(piece.id, []).extend(piece.tokens)
        engine.scheduler.check()
    assert engine.pool.num_held == 0
    assert not engine._live
    alone = Engine(model, share=False)
    for request in requests:
        expected = alone.run([request])[0].tokens
        got = aborted[request.id].tokens if request.id in aborted else log[request.id]
        assert got == expected[: len(got)]
        assert request.id in aborted or got == expected


def test_weights_changed_behind_the_engines_back_are_noticed_when_it_is_asked_again(
    make_model: Callable[..., Qwen3], naive: Naive
) -> None:
    """A trainer shares its module with the engine: what the cache holds of the old weights is worth nothing."""
    model, other = make_model(0), make_model(1)
    [prompt] = prompts([40])
    engine = Engine(model)
    engine.run([greedy("a", prompt, 3)])
    with torch.no_grad():
        for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
            parameter.copy_(new)
    [completion] = engine.run([greedy("b", prompt, 9)])
    assert completion.tokens == naive(other, prompt, 9)["tokens"]
    assert engine.version == 1
