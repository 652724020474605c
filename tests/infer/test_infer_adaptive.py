"""Adaptive budgets: they know hard questions from easy ones, and suffice as often as they promise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pensar.base.errors import DataError, ModelError
from pensar.infer.adaptive import AdaptiveBudget
from pensar.infer.budget import NO_BUDGET
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.native.runner import NativeRunner
from pensar.infer.torch_runner import TorchRunner
from pensar.text.tokenizer import THINK

WIDTH = 12


def learned(states: torch.Tensor, lengths: list[int]) -> AdaptiveBudget:
    """From one reply to each question."""
    return AdaptiveBudget.fit(states, [[length] for length in lengths])


def questions(count: int, seed: int, noise: float = 0.3) -> tuple[torch.Tensor, list[int]]:
    """States whose first two values say how long the thinking takes, in a fixed frame of their own."""
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
    inner = rng.normal(size=(count, WIDTH))
    length = np.exp(3.5 + 0.8 * inner[:, 0] - 0.5 * inner[:, 1] + noise * rng.normal(size=count))
    return torch.from_numpy(inner @ frame + 2.0).float(), np.round(length).astype(int).tolist()


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_budgets_suffice_for_the_share_of_new_questions_that_was_asked_for(share: float) -> None:
    budgets = learned(*questions(300, 1))
    states, lengths = questions(2_000, 2)
    given = np.asarray([budgets.budget(state, share) for state in states])
    assert np.mean(np.asarray(lengths) <= given) == pytest.approx(share, abs=0.04)


def test_the_same_share_is_promised_with_fewer_tokens_than_one_budget_for_all() -> None:
    budgets = learned(*questions(300, 1))
    states, lengths = questions(2_000, 2)
    given = np.asarray([budgets.budget(state, 0.9) for state in states])
    assert given.mean() < 0.75 * np.quantile(lengths, 0.9)
    assert np.corrcoef(np.log1p(lengths), np.log1p(given))[0, 1] > 0.9


def test_the_left_out_errors_are_those_of_really_leaving_out() -> None:
    states, lengths = questions(40, 3)
    whole = learned(states, lengths)
    errors = []
    for i in range(40):
        kept = [j for j in range(40) if j != i]
        x = states[kept].double().numpy()
        y = np.log1p(np.asarray(lengths, float)[kept])
        centred = x - x.mean(0)
        # The penalty that the fit chose, found again from its weights.
        full = states.double().numpy() - states.double().numpy().mean(0)
        target = np.log1p(np.asarray(lengths, float))
        gram, moment = full.T @ full, full.T @ (target - target.mean())
        weight = whole.weight_D.double().numpy()
        penalty = float(weight @ (moment - gram @ weight) / (weight @ weight))
        own = np.linalg.solve(centred.T @ centred + penalty * np.eye(WIDTH), centred.T @ (y - y.mean()))
        errors.append(target[i] - y.mean() - (states[i].double().numpy() - x.mean(0)) @ own)
    np.testing.assert_allclose(np.sort(errors), whole.errors_n.numpy(), atol=0.02)


def several(count: int, seed: int, replies: int, noise: float) -> tuple[torch.Tensor, list[list[int]]]:
    """Questions with some replies each, as long as the question asks times a factor of its own."""
    states, centres = questions(count, seed, noise=0.0)
    rng = np.random.default_rng(seed + 1_000)
    return states, [
        np.round(centre * np.exp(noise * rng.normal(size=replies))).astype(int).tolist() for centre in centres
    ]


def test_several_replies_tell_more_of_a_question_and_the_promise_is_for_one_more() -> None:
    new, lengths = several(2_000, 2, 1, noise=0.8)
    spent, errors = {}, {}
    for replies in (1, 8):
        sufficed, tokens, off = [], [], []
        for seed in range(10, 20):
            budgets = AdaptiveBudget.fit(*several(60, seed, replies, noise=0.8))
            given = np.asarray([budgets.budget(state, 0.8) for state in new])
            sufficed.append(np.mean(np.asarray(lengths)[:, 0] <= given))
            tokens.append(given.mean())
            off.append(np.corrcoef(np.log(given), np.log(questions(2_000, 2, noise=0.0)[1]))[0, 1])
        assert np.mean(sufficed) == pytest.approx(0.8, abs=0.04)
        spent[replies], errors[replies] = np.mean(tokens), 1 - np.mean(off)
    assert errors[8] < 0.5 * errors[1]
    assert spent[8] < spent[1]


def test_it_is_kept_in_the_models_folder(tmp_path: Path) -> None:
    assert AdaptiveBudget.load(tmp_path, WIDTH) is None
    budgets = learned(*questions(50, 1))
    budgets.save(tmp_path)
    again = AdaptiveBudget.load(tmp_path, WIDTH)
    assert again is not None
    states, _ = questions(20, 5)
    assert [again.budget(s, 0.7) for s in states] == [budgets.budget(s, 0.7) for s in states]
    with pytest.raises(ModelError, match="states of 12 values, the model's have 13"):
        AdaptiveBudget.load(tmp_path, 13)
    with pytest.raises(
        DataError, match="3 answered questions to learn thinking budgets from; give at least 16"
    ):
        learned(torch.zeros(3, 2), [1, 2, 3])


def test_states_out_of_all_measure_set_no_limit() -> None:
    budgets = AdaptiveBudget(torch.zeros(1), torch.ones(1), 0.0, torch.zeros(20))
    assert budgets.budget(torch.tensor([3.0]), 0.5) == 20  # e^3 - 1, rounded up
    assert budgets.budget(torch.tensor([-torch.inf]), 0.5) == 0
    for value in (60.0, 1e4, torch.inf, torch.nan):
        assert 2**52 < budgets.budget(torch.tensor([value]), 0.5) < NO_BUDGET


@pytest.mark.parametrize("native", [False, True])
def test_a_question_that_the_model_has_no_numbers_for_fails_alone(
    make_model: Any, tokenizer: Any, native: bool
) -> None:
    model = make_model()
    asked = [[*tokenizer.encode(text), tokenizer.special(THINK)] for text in ("the cat", "one two three")]
    rare = next(token for token in range(50, 100) if token not in {*asked[0], *asked[1]})
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = torch.nan
    engine = Engine(NativeRunner(model) if native else TorchRunner(model), tokenizer)
    engine.adaptive = AdaptiveBudget(torch.zeros(32), torch.zeros(32), 2.0, torch.zeros(9))
    params = SamplingParams(max_tokens=30, adaptive_budget=0.5, temperature=1.0, bad_ids=(rare,))
    odd = Request("odd", [rare, *asked[1]], params)
    whole = engine.run([Request("0", asked[0], params), odd, Request("1", asked[1], params)])
    assert whole[1].finish_reason == "error"
    assert whole[1].error is not None
    assert "NaN" in whole[1].error
    assert all(0 < whole[at].num_reasoning_tokens <= 7 for at in (0, 2))


def test_the_least_thinking_that_a_request_asks_for_wins_over_what_was_learned(
    make_model: Any, tokenizer: Any
) -> None:
    engine = Engine(make_model(), tokenizer)
    engine.adaptive = AdaptiveBudget(torch.zeros(32), torch.zeros(32), 1.0, torch.zeros(9))
    prompt = [*tokenizer.encode("the cat"), tokenizer.special(THINK)]
    for least, expected in ((0, 2), (2, 2), (9, 9)):
        params = SamplingParams(max_tokens=40, adaptive_budget=0.5, min_thinking=least)
        [done] = engine.run([Request("x", prompt, params)])
        assert any(done.forced)
        assert done.num_reasoning_tokens == expected


def test_the_engine_sets_each_budget_from_its_prompts_state(make_model: Any, tokenizer: Any) -> None:
    model = make_model()
    prompts = [
        [*tokenizer.encode(text), tokenizer.special(THINK)] for text in ("the cat", "one two three", "mat")
    ]
    engine = Engine(model, tokenizer)
    states: dict[int, torch.Tensor] = {}
    run = engine.runner.run

    def watched(batch: Any) -> Any:
        output = run(batch)
        for row, length in enumerate(batch.lengths_R.tolist()):
            if length in {len(prompt) for prompt in prompts}:
                states.setdefault(length, output.hidden_SD[row])
        return output

    engine.runner.run = watched  # type: ignore[method-assign]
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0)) / 8
    engine.adaptive = AdaptiveBudget(torch.zeros(32), weight, 2.0, torch.zeros(9))
    params = SamplingParams(max_tokens=120, adaptive_budget=0.5)
    capped = SamplingParams(max_tokens=120, adaptive_budget=0.5, thinking_budget=2)
    done = engine.run([Request(str(i), prompt, params) for i, prompt in enumerate(prompts)])
    short = engine.run([Request(str(i), prompt, capped) for i, prompt in enumerate(prompts)])
    expected = [engine.adaptive.budget(states[len(prompt)], 0.5) for prompt in prompts]
    assert len(set(expected)) > 1
    for completion, less, budget in zip(done, short, expected, strict=True):
        assert completion.num_reasoning_tokens <= budget
        if any(completion.forced):
            assert completion.num_reasoning_tokens == budget
        assert less.num_reasoning_tokens <= min(2, budget)
    assert any(any(completion.forced) for completion in done)
    engine.adaptive = None
    with pytest.raises(ModelError, match="has no learned thinking budgets"):
        engine.submit(Request("x", prompts[0], params))
