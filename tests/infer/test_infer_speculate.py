"""Guesses of any kind leave replies as they are; what is kept is counted; as many are made as pay."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from markov import MarkovRunner

from pensar.base.errors import ConfigError, ModelError, RunError
from pensar.infer.drafts.draft_model import DraftModel
from pensar.infer.drafts.head import HeadDrafts
from pensar.infer.drafts.lengths import Lengths, LineFit
from pensar.infer.drafts.lookup import Lookup
from pensar.infer.drafts.proposer import Asked, FirstOf, Proposer, States
from pensar.infer.engine import Completion, Engine, Request, SamplingParams
from pensar.infer.native.runner import NativeRunner
from pensar.infer.request import Grammar, Ints
from pensar.infer.rows import RunningRows
from pensar.infer.speculate import Acceptance, Speculation, speculation
from pensar.infer.step import Runner
from pensar.model.draft_head import DraftHead, initialize_head
from pensar.model.qwen3 import Qwen3
from pensar.posttrain.unrolled import Replies, unroll
from pensar.text.packing import one_per_row
from pensar.text.sample import Sample
from pensar.text.tokenizer import THINK, Tokenizer
from tiny import save, tiny_model

VOCABULARY = 24


class Fixed:
    """Guesses what a function of the text says, and remembers what it was told."""

    wants_states = True

    def __init__(self, guess: Callable[[Ints, int], Sequence[int]]) -> None:
        self._guess = guess
        self.seen: dict[str, list[States]] = {}
        self.forgotten: list[str] = []
        self.asked: list[tuple[str, int]] = []

    def propose(self, asked: Asked) -> list[Ints]:
        found = []
        for row, count in zip(asked.chosen.tolist(), asked.counts.tolist(), strict=True):
            self.asked.append((asked.rows.requests[row].id, count))
            found.append(np.asarray(self._guess(asked.rows.text(row), count), np.int64))
        return found

    def observe(self, rows: RunningRows, states: Sequence[States]) -> None:
        for new in states:
            self.seen.setdefault(new.name, []).append(new)

    def forget(self, name: str) -> None:
        self.forgotten.append(name)
        self.seen.pop(name, None)


def garbage(seed: int) -> Fixed:
    generator = np.random.default_rng(seed)
    return Fixed(
        lambda text, count: generator.integers(0, VOCABULARY, generator.integers(0, count + 1)).tolist()
    )


def requests(number: int, seed: int, vocabulary: int = VOCABULARY, **fixed: Any) -> list[Request]:
    generator = np.random.default_rng(seed)
    found = []
    for index in range(number):
        params: dict[str, Any] = {
            "max_tokens": int(generator.integers(1, 50)),
            "temperature": float(generator.choice([0.0, 0.6, 1.0, 1.5])),
            "top_k": int(generator.choice([0, 0, 5])),
            "top_p": float(generator.choice([1.0, 0.9])),
            "seed": index,
            "stop_ids": tuple(generator.integers(0, vocabulary, generator.integers(0, 2)).tolist()),
            "logprobs": bool(generator.integers(0, 2)),
            "top_logprobs": int(generator.choice([0, 0, 3])),
            "prompt_logprobs": bool(generator.integers(0, 8) == 0),
        }
        prompt = generator.integers(0, vocabulary, generator.integers(1, 40)).tolist()
        found.append(Request(str(index), prompt, SamplingParams(**(params | fixed))))
    return found


def served(
    model: Qwen3 | Runner, asked: Sequence[Request], guesser: Speculation | None = None, **options: Any
) -> list[Completion]:
    engine = Engine(model, **({"slots": 5} | options))
    engine.speculation = guesser
    completions = engine.run(asked)
    engine.pool.check()
    assert engine.pool.num_held == 0
    return completions


def same_texts(first: Sequence[Completion], second: Sequence[Completion]) -> None:
    for left, right in zip(first, second, strict=True):
        assert left.tokens == right.tokens
        assert left.finish_reason == right.finish_reason
        assert left.forced == right.forced
        assert left.num_reasoning_tokens == right.num_reasoning_tokens
        np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-5)
        np.testing.assert_allclose(left.prompt_logprobs, right.prompt_logprobs, atol=1e-5)
        assert len(left.top_logprobs) == len(right.top_logprobs)
        for tops, others in zip(left.top_logprobs, right.top_logprobs, strict=True):
            assert [token for token, _ in tops] == [token for token, _ in others]


def guessers() -> dict[str, Callable[[], Proposer]]:
    """The model itself, one like it, one unlike it, and copying."""
    return {
        "itself": lambda: DraftModel(MarkovRunner(VOCABULARY)),
        "like it": lambda: DraftModel(MarkovRunner(VOCABULARY, noise=0.5)),
        "unlike it": lambda: DraftModel(MarkovRunner(VOCABULARY, seed=9)),
        "small cache": lambda: DraftModel(MarkovRunner(VOCABULARY), cache_tokens=96),
        "short steps": lambda: DraftModel(MarkovRunner(VOCABULARY), step_tokens=7),
        "lookup": lambda: Lookup(shortest=1),
        "lookup, then model": lambda: FirstOf(Lookup(), DraftModel(MarkovRunner(VOCABULARY, noise=0.5))),
        "garbage": lambda: garbage(3),
    }


# ---------------------------------------------------------------- the same replies


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", guessers())
def test_replies_are_the_same_whoever_guesses(name: str, adaptive: bool) -> None:
    asked = requests(60, seed=1)
    plain = served(MarkovRunner(VOCABULARY), asked)
    guesser = Speculation(guessers()[name](), 6, adaptive)
    same_texts(served(MarkovRunner(VOCABULARY), asked, guesser), plain)
    assert guesser.acceptance.passes > 0


def test_pages_that_run_out_and_prompts_in_chunks_change_nothing() -> None:
    asked = requests(30, seed=2, max_tokens=40, temperature=0.8)
    plain = served(MarkovRunner(VOCABULARY), asked)
    tight = {"cache_tokens": 160, "step_tokens": 16, "slots": 8}
    for proposer in (DraftModel(MarkovRunner(VOCABULARY, noise=0.5)), garbage(1)):
        same_texts(served(MarkovRunner(VOCABULARY), asked, Speculation(proposer, 6, False), **tight), plain)


def test_the_model_s_own_replies_are_the_same_with_a_head_a_student_and_itself(make_model: Any) -> None:
    model = make_model().double()
    head = DraftHead(model.config, 16).double()
    initialize_head(head, 0)
    asked = requests(24, seed=3, vocabulary=320)
    plain = served(model, asked)
    proposers: list[Proposer] = [HeadDrafts(head, model), DraftModel(make_model(1)), DraftModel(model)]
    kept = []
    for proposer in proposers:
        guesser = Speculation(proposer, 5, adaptive=False)
        same_texts(served(model, asked, guesser), plain)
        kept.append(guesser.acceptance)
    assert kept[2].kept == kept[2].tried, "a model guesses its own draws, however hot"
    assert sum(kept[0].kept) < sum(kept[0].tried)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_on_kernels_of_our_own_guesses_leave_every_bit(make_model: Any, weights: Any) -> None:
    try:
        runners = [NativeRunner(make_model(hidden_size=64, head_dim=16), weights) for _ in range(3)]
    except RunError as error:
        pytest.skip(str(error))
    asked = requests(24, seed=9, vocabulary=320, temperature=0.9)
    plain = served(runners[0], asked)
    guesser = Speculation(DraftModel(runners[1]), 5, adaptive=False)
    found = served(runners[2], asked, guesser)
    for left, right in zip(plain, found, strict=True):
        assert left == msgspec.structs.replace(right, num_cached_tokens=left.num_cached_tokens)
    assert guesser.acceptance.kept == guesser.acceptance.tried


def test_draws_have_the_model_s_distribution() -> None:
    """Chi-square of the third token of 6,000 replies against the chain's own probabilities, worked out exactly."""
    runner = MarkovRunner(6, sharpness=1.0)
    params = SamplingParams(max_tokens=3, temperature=1.0)
    asked = [Request(str(seed), [0, 1], msgspec.structs.replace(params, seed=seed)) for seed in range(6_000)]
    guesser = Speculation(DraftModel(MarkovRunner(6, sharpness=1.0, noise=1.0)), 2, adaptive=False)
    counts = Counter(completion.tokens[2] for completion in served(runner, asked, guesser, slots=64))
    chances = runner.table.double().softmax(-1).numpy()
    pairs = chances[0, 1][:, None] * chances[1]
    third = np.einsum("ab,abc->c", pairs, chances)
    expected = third * len(asked)
    statistic = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in range(6))
    assert statistic < 20.5, "a chance of 1 in 1,000 at 5 degrees of freedom"
    # The first guess is of the second token: how often it is right is not how often equal draws would be.
    assert 0.3 < guesser.acceptance.kept[0] / guesser.acceptance.tried[0] < 0.95


# ---------------------------------------------------------------- what is kept


def test_what_is_kept_is_counted_by_place() -> None:
    runner = MarkovRunner(VOCABULARY)
    prompt = [3, 5]
    greedy = SamplingParams(max_tokens=13)
    [truth] = served(runner, [Request("a", prompt, greedy)])
    whole = [*prompt, *truth.tokens]

    def half_right(text: Ints, count: int) -> list[int]:
        right = whole[len(text) : len(text) + 2]
        return [*right, (whole[len(text) + 2] + 1) % VOCABULARY, 0][:count]

    proposer = Fixed(half_right)
    runner.num_passes = 0
    guesser = Speculation(proposer, 4, adaptive=False)
    engine = Engine(runner, slots=2)
    engine.speculation = guesser
    [found] = engine.run([Request("a", prompt, greedy)])
    assert found.tokens == truth.tokens
    # The prompt gives one token, each of 4 passes 3 more.
    assert runner.num_passes == 5
    assert guesser.acceptance == Acceptance(passes=4, tried=[4, 4, 3, 3], kept=[4, 4, 0, 0])
    assert guesser.acceptance.tokens_per_pass == 3
    assert [count for _, count in proposer.asked] == [4, 4, 4, 2], "the last guess leaves room for a draw"


def test_states_are_those_of_kept_tokens_one_after_another() -> None:
    runner = MarkovRunner(VOCABULARY)
    proposer = Fixed(lambda text, count: [7] * count)
    engine = Engine(runner, slots=4)
    engine.speculation = Speculation(proposer, 3, adaptive=False)
    for request in requests(4, seed=5, max_tokens=30, temperature=1.0, stop_ids=()):
        engine.submit(request)
    for _ in range(12):
        engine.step()
        for row in range(engine.rows.num):
            name, text = engine.rows.requests[row].id, engine.rows.text(row)
            seen = torch.cat([states.hidden_qD for states in proposer.seen[name]])
            first = proposer.seen[name][0].first
            assert first == engine.rows.state["prompt"][row] - 1
            assert seen[:, 0].tolist() == list(range(first, len(text) - 1))
            assert seen[:, 1].tolist() == text[first:-1].tolist()


def test_a_request_that_takes_an_old_id_is_another_one() -> None:
    engine = Engine(MarkovRunner(VOCABULARY), slots=2)
    proposer = Fixed(lambda text, count: [])
    engine.speculation = Speculation(proposer, 3, adaptive=False)
    for turn in range(3):
        engine.run([Request("same", [turn, turn], SamplingParams(max_tokens=3))])
    engine.run([Request("other", [1], SamplingParams(max_tokens=1))])
    assert proposer.forgotten == ["same"] * 3


# ---------------------------------------------------------------- budgets, stops, grammars


@pytest.mark.parametrize("budget", [0, 1, 5, 17])
def test_guesses_never_cross_a_thinking_budget(tokenizer: Tokenizer, make_model: Any, budget: int) -> None:
    model = make_model()
    prompt = [*tokenizer.encode("the cat"), tokenizer.special(THINK)]
    params = SamplingParams(max_tokens=80, temperature=1.0, thinking_budget=budget, logprobs=True)
    asked = [Request(str(n), [*prompt, n], msgspec.structs.replace(params, seed=n)) for n in range(12)]
    plain = Engine(model, tokenizer, slots=6).run(asked)
    proposer = DraftModel(model)
    engine = Engine(model, tokenizer, slots=6)
    engine.speculation = Speculation(proposer, 6, adaptive=False)
    same_texts(engine.run(asked), plain)
    assert max(completion.num_reasoning_tokens for completion in plain) <= budget
    assert any(any(completion.forced) for completion in plain)


def test_as_many_guesses_are_asked_for_as_a_budget_has_left(tokenizer: Tokenizer, make_model: Any) -> None:
    proposer = Fixed(lambda text, count: [9] * count)
    engine = Engine(make_model(), tokenizer, slots=1)
    engine.speculation = Speculation(proposer, 6, adaptive=False)
    prompt = [*tokenizer.encode("the cat"), tokenizer.special(THINK)]
    engine.submit(Request("a", prompt, SamplingParams(max_tokens=80, thinking_budget=5)))
    left = []
    for _ in range(5):
        piece = engine.step()[-1]
        assert piece.reasoning_left is not None
        left.append(piece.reasoning_left)
    assert [count for _, count in proposer.asked] == [min(6, x) for x in left[:-1]]


def test_grammars_go_along_with_guesses(tokenizer: Tokenizer, make_model: Any) -> None:
    model = make_model()
    grammar = Grammar(kind="regex", text="(one and|two are) [0-9]{2,6}(three|cat)")
    asked = [
        Request(
            str(n),
            tokenizer.encode("the cat sat"),
            SamplingParams(
                max_tokens=40,
                temperature=1.0,
                seed=n,
                grammar=grammar,
                frequency_penalty=0.5,
                logit_bias=((5, 1.0),),
            ),
        )
        for n in range(10)
    ]
    plain = Engine(model, tokenizer, slots=4).run(asked)
    assert all(completion.finish_reason == "stop" for completion in plain)
    for proposer in (DraftModel(model), DraftModel(make_model(1)), garbage(2), Fixed(lambda text, count: [])):
        engine = Engine(model, tokenizer, slots=4)
        engine.speculation = Speculation(proposer, 5, adaptive=False)
        same_texts(engine.run(asked), plain)
        assert engine.speculation.acceptance.passes > 0, "what a grammar forces is guessed by nobody else"


def test_guesses_end_with_a_stop_token() -> None:
    runner = MarkovRunner(VOCABULARY)
    [free] = served(runner, [Request("a", [1], SamplingParams(max_tokens=20))])
    stop = free.tokens[9]
    asked = [Request("a", [1], SamplingParams(max_tokens=20, stop_ids=(stop,)))]
    whole = [1, *free.tokens]
    proposer = Fixed(lambda text, count: whole[len(text) : len(text) + count])
    runner.num_computed = 0
    [stopped] = served(runner, asked, Speculation(proposer, 8, adaptive=False))
    first = free.tokens.index(stop)
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.finish_reason == "stop"
    assert runner.num_computed == first + 2, (
        "the prompt's token and every token of the reply once, none beyond"
    )


# ---------------------------------------------------------------- proposers


def admitted(text: Sequence[int]) -> Engine:
    """An engine that is about to compute this prompt of request "a"."""
    engine = Engine(MarkovRunner(VOCABULARY), slots=1)
    engine.submit(Request("a", list(text), SamplingParams(max_tokens=400)))
    engine.scheduler.admit()
    return engine


def test_lookup_finds_the_longest_ending_that_stood_before() -> None:
    lookup = Lookup(shortest=2, longest=5, per_match=8)

    def guess(text: Sequence[int], count: int) -> list[int]:
        engine = admitted(text)
        [found] = lookup.propose(Asked(engine.rows, np.array([0]), np.array([count])))
        lookup.forget("a")
        return found.tolist()

    assert guess([1, 2, 3, 4, 9, 2, 3, 7, 8, 2, 3], 3) == [7, 8, 2], "of equally long ones the last"
    assert guess([1, 2, 3, 4, 9, 2, 3, 7, 8, 1, 2, 3], 2) == [4, 9], "the longest"
    assert guess([5, 6, 7, 8], 3) == []
    assert guess([4, 4, 4], 3) == [4, 4, 4], "what repeats itself goes on"
    assert guess([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert guess([1], 3) == guess([1, 1], 3) == []


def naive_lookup(text: list[int], longest: int, shortest: int) -> int:
    """The place behind the longest match, of equally long ones the last; -1 for none."""
    for length in range(longest, shortest - 1, -1):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[len(text) - length :]:
                return place
    return -1


def test_lookup_finds_what_a_search_of_the_whole_text_finds() -> None:
    generator = np.random.default_rng(0)
    text = generator.integers(0, 6, 400)
    rows = admitted(text[:20].tolist()).rows
    lookup = Lookup(shortest=4, longest=7)
    found = 0
    while int(rows.state["total"][0]) < len(text):
        total = int(rows.state["total"][0])
        [guess] = lookup.propose(Asked(rows, np.array([0]), np.array([1])))
        place = naive_lookup(text[:total].tolist(), 7, 4)
        assert guess.tolist() == ([] if place < 0 else [text[place]])
        found += place >= 0
        more = int(generator.integers(1, 4))
        for token in text[total : total + more]:
            rows.append(np.array([0]), np.array([token]), 0)
    assert found > 10


def test_a_draft_model_computes_only_what_is_new() -> None:
    draft = MarkovRunner(VOCABULARY)
    asked = [Request("a", list(range(20)), SamplingParams(max_tokens=40, temperature=1.0, seed=4))]
    guesser = Speculation(DraftModel(draft), 3, adaptive=False)
    served(MarkovRunner(VOCABULARY), asked, guesser)
    # The prompt, the first token and the guesses but the last; of each of 8 passes of 4 tokens the two that it has not
    # seen, and again the guesses but the last; and in the end there is room for 2 guesses.
    assert draft.num_computed == 21 + 2 + 8 * 4 + 3
    wrong = MarkovRunner(VOCABULARY, seed=5)
    served(MarkovRunner(VOCABULARY), asked, Speculation(DraftModel(wrong), 3, adaptive=False))
    assert wrong.num_computed <= 20 + 40 * 3


def test_a_draft_model_gives_up_the_pages_of_others_and_texts_that_are_too_long() -> None:
    draft = DraftModel(MarkovRunner(VOCABULARY), cache_tokens=64)
    asked = requests(12, seed=8, max_tokens=30, temperature=1.0)
    guesser = Speculation(draft, 4, adaptive=False)
    served(MarkovRunner(VOCABULARY), asked, guesser, slots=6)
    draft._pool.check()
    assert guesser.acceptance.passes > 0
    short = DraftModel(MarkovRunner(VOCABULARY), max_tokens=10)
    guesser = Speculation(short, 4, adaptive=False)
    served(MarkovRunner(VOCABULARY), [Request("a", [1] * 20, SamplingParams(max_tokens=9))], guesser)
    assert guesser.acceptance.passes == 0


def naive_guesses(
    model: Qwen3, head: DraftHead, text: list[int], prompt: int, first: int, count: int
) -> list[int]:
    """Greedy guesses after a text, from one pass of the model and one of the unrolled head for each guess."""
    guesses: list[int] = []
    for depth in range(count):
        tokens = [*text, *guesses, 0]  # the last one stands for what is guessed
        marks = np.zeros(len(tokens), np.float32)
        marks[max(prompt, first + 1) :] = 1
        batch = one_per_row([Sample(tokens=np.asarray(tokens, np.int32), ce=marks)])
        replies = Replies.of(batch)
        hidden = replies.hidden(model)
        with torch.no_grad():
            states = list(unroll(model, head, replies, hidden, depth + 1))[-1]
            guesses.append(int(model.logits(states)[0, len(tokens) - 3].argmax()))
    return guesses


@pytest.mark.parametrize("window", [4, 64])
def test_a_head_guesses_in_the_engine_what_it_guesses_in_training(make_model: Any, window: int) -> None:
    model = make_model()
    head = DraftHead(model.config, window)
    initialize_head(head, 1)
    drafts = HeadDrafts(head, model)
    checked = 0

    class Watched(HeadDrafts):
        def propose(self, asked: Asked) -> list[Ints]:
            nonlocal checked
            found = super().propose(asked)
            for row, guess in zip(asked.chosen.tolist(), found, strict=True):
                text, prompt = asked.rows.text(row).tolist(), int(asked.rows.state["prompt"][row])
                if len(guess):
                    assert guess.tolist() == naive_guesses(model, head, text, prompt, 0, len(guess))
                    checked += 1
            return found

    drafts = Watched(head, model)
    asked = requests(6, seed=6, vocabulary=320, max_tokens=14, temperature=0.0, stop_ids=())
    guesser = Speculation(drafts, 4, adaptive=False)
    served(model, asked, guesser, slots=3)
    assert checked > 30


# ---------------------------------------------------------------- how many


def test_a_line_is_fitted_to_what_was_seen_lately() -> None:
    line = LineFit()
    assert line.at(5.0) == 0
    generator = np.random.default_rng(0)
    for x in generator.integers(1, 20, 200).tolist():
        line.add(x, 3.0 + 0.5 * x + 0.1 * generator.normal())
    assert line.each == pytest.approx(0.5, abs=0.05)
    assert line.at(10.0) == pytest.approx(8.0, abs=0.2)
    for x in generator.integers(1, 20, 200).tolist():
        line.add(x, 1.0 + 2.0 * x)
    assert line.each == pytest.approx(2.0, abs=0.05)


def chosen(lengths: Lengths, names: Sequence[str], rates: Sequence[float]) -> Ints:
    """What a loop of choosing and learning settles at, where guesses are right with these probabilities."""
    generator = np.random.default_rng(0)
    most = np.full(len(names), lengths.max_drafts)
    sums = np.zeros(len(names))
    for turn in range(400):
        counts = lengths.choose(names, most, 0, 10_000)
        for name, count, rate in zip(names, counts.tolist(), rates, strict=True):
            if count:
                right = generator.random(count) < rate
                lengths.learn(name, count, int(np.argmin(right)) if not right.all() else count)
        sums += counts if turn >= 200 else 0
    return np.round(sums / 200).astype(np.int64)


def with_times(fixed: float, token: float, guess: float) -> Lengths:
    lengths = Lengths(8)
    for tokens in (1, 3, 9, 40, 200):
        lengths.passes.add(tokens, fixed + token * tokens)
    for depth in (1, 4, 8):
        lengths.drafting.add(depth, guess * depth)
    return lengths


def best_count(rate: float, fixed: float, token: float, guess: float) -> int:
    """The number of guesses of one row that gives most tokens a second."""
    gains = [
        sum(rate**place for place in range(count + 1)) / (fixed + token * (count + 1) + guess * count)
        for count in range(9)
    ]
    return int(np.argmax(gains))


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize(("fixed", "token", "guess"), [(10.0, 0.1, 0.5), (10.0, 1.0, 0.0), (1.0, 1.0, 0.5)])
def test_the_number_of_guesses_becomes_the_best_one(
    rate: float, fixed: float, token: float, guess: float
) -> None:
    [count] = chosen(with_times(fixed, token, guess), ["a"], [rate])
    best = best_count(rate, fixed, token, guess)
    assert abs(int(count) - best) <= (1 if best < 5 else 2)


def test_rows_get_as_many_as_their_own_acceptance_pays_and_large_batches_none() -> None:
    lengths = with_times(10.0, 0.3, 0.1)
    good, bad = chosen(lengths, ["good", "bad"], [0.95, 0.05]).tolist()
    assert good >= 5
    assert bad <= 1
    crowd = [str(n) for n in range(64)]
    busy = with_times(1.0, 1.0, 0.1)  # every token costs as much as a pass
    assert chosen(busy, crowd, [0.6] * 64).mean() < 0.5
    free = with_times(64.0, 0.01, 0.1)
    assert chosen(free, crowd, [0.6] * 64).mean() > 2


def test_guesses_are_tried_again_when_there_were_none_for_long() -> None:
    lengths = with_times(1.0, 10.0, 1.0)
    most = np.array([8])
    given = [int(lengths.choose(["a"], most, 0, 100)[0]) for _ in range(200)]
    assert given.count(0) > 180
    assert [turn for turn, count in enumerate(given) if count] == [15, 47, 111]
    assert set(given) == {0, 2}


def test_texts_do_not_depend_on_what_the_clock_says() -> None:
    asked = requests(30, seed=4, temperature=1.0, max_tokens=30)
    plain = served(MarkovRunner(VOCABULARY), asked)
    generator = np.random.default_rng(0)
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += float(generator.exponential())
        return now

    guesser = Speculation(DraftModel(MarkovRunner(VOCABULARY, noise=0.5)), 6, clock=clock)
    same_texts(served(MarkovRunner(VOCABULARY), asked, guesser), plain)
    assert guesser.acceptance.passes > 0


# ---------------------------------------------------------------- opening


def test_what_a_server_asks_for_is_opened(make_model: Any, tokenizer: Tokenizer, tmp_path: Any) -> None:
    model = make_model()
    assert speculation(model) is None
    save(make_model(1), tokenizer, tmp_path / "student")
    head = DraftHead(model.config, 8)
    initialize_head(head, 0)
    head.save(tmp_path / "head")
    asked = requests(8, seed=7, vocabulary=320)
    plain = served(model, asked)
    for options in (
        {"lookup": True},
        {"lookup": True, "head": tmp_path / "head"},
        {"draft": tmp_path / "student"},
    ):
        same_texts(served(model, asked, speculation(model, max_drafts=3, **options)), plain)
    with pytest.raises(ConfigError, match="give one of them"):
        speculation(model, head=tmp_path, draft=tmp_path)
    with pytest.raises(ConfigError, match="max_drafts is 0; give 1 to 64"):
        Speculation(Lookup(), 0)
    save(tiny_model(vocab_size=tokenizer.vocab_size + 8), tokenizer, tmp_path / "other")
    with pytest.raises(ConfigError, match="both need the same tokenizer"):
        speculation(model, draft=tmp_path / "other")
    with pytest.raises(ModelError, match="does not exist; train a draft head"):
        speculation(model, head=tmp_path / "nowhere")


def test_a_head_is_opened_as_it_was_saved_and_only_by_its_model(make_model: Any, tmp_path: Any) -> None:
    model = make_model()
    head = DraftHead(model.config, 8)
    initialize_head(head, 3)
    head.save(tmp_path)
    opened = DraftHead.load(tmp_path, model)
    assert opened.window == 8
    for (name, left), right in zip(head.named_parameters(), opened.parameters(), strict=True):
        assert torch.equal(left, right), name
    assert DraftHead.load(tmp_path, model.double()).model.norm.weight.dtype == torch.float64
    with pytest.raises(ModelError, match="hidden_size 32, this one has 48"):
        DraftHead.load(tmp_path, make_model(hidden_size=48))
