import numpy as np
import pytest
import torch
import transformers

from pensar.base.errors import ModelError
from pensar.infer.budget import Thinking
from pensar.infer.constraint import Constraints, apply_all
from pensar.infer.request import Request, SamplingParams, checked_prompt
from pensar.text.tokenizer import THINK, THINK_END

VOCABULARY = 320


@pytest.fixture(scope="module")
def constraints(tokenizer):
    ends = (tokenizer.eos_id, tokenizer.pad_id)
    return Constraints(VOCABULARY, tokenizer, Thinking(tokenizer), ends)


def make(constraints, prompt=(1, 2, 3), **fields):
    params = SamplingParams(max_tokens=50, **fields)
    return constraints.of(Request("r", list(prompt), params), np.asarray(prompt, np.int64))


def logits(num_rows=1, seed=0):
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def applied(constraint, values):
    changed = values.clone()
    constraint.apply(changed)
    return changed


def banned(constraint):
    return set(torch.isinf(applied(constraint, torch.zeros(VOCABULARY))).nonzero()[:, 0].tolist())


def test_a_request_that_asks_for_nothing_has_no_constraint(constraints):
    assert make(constraints) is None
    assert make(constraints, temperature=1.0, top_k=5, stop=("x",), top_logprobs=3, ignore_eos=True) is None


def test_repetition_penalty_is_that_of_transformers(constraints):
    prompt, reply = [5, 9, 9, 300], [7, 5, 7]
    for penalty in (1.3, 0.7):
        constraint = make(constraints, prompt, repetition_penalty=penalty)
        for token in reply:
            constraint.accept(token)
        values = logits()
        reference = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        wanted = reference(torch.tensor([prompt + reply]), values.clone())
        assert torch.equal(applied(constraint, values[0]), wanted[0])


def test_frequency_and_presence_penalties_follow_openais_formula_over_the_reply(constraints):
    constraint = make(constraints, [4, 4, 4], frequency_penalty=0.5, presence_penalty=-1.25)
    for token in (7, 8, 7):
        constraint.accept(token)
    counts = np.zeros(VOCABULARY)
    counts[[7, 8]] = [2, 1]
    values = logits()[0]
    wanted = values.double().numpy() - counts * 0.5 - (counts > 0) * -1.25
    assert applied(constraint, values).tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_bias_and_bad_ids_are_those_of_transformers(constraints):
    bias = ((3, 4.5), (200, -100.0))
    values, text = logits(), torch.tensor([[1, 2, 3]])
    constraint = make(constraints, logit_bias=bias)
    reference = transformers.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias])
    assert torch.equal(applied(constraint, values[0]), reference(text, values.clone())[0])
    constraint = make(constraints, bad_ids=(9, 5))
    reference = transformers.NoBadWordsLogitsProcessor([[9], [5]], eos_token_id=None)
    assert torch.equal(applied(constraint, values[0]), reference(text, values.clone())[0])


def test_min_tokens_is_that_of_transformers(constraints, tokenizer):
    ends = [tokenizer.eos_id, tokenizer.pad_id, 17]
    reference = transformers.MinNewTokensLengthLogitsProcessor(3, 2, ends, device="cpu")
    constraint = make(constraints, [1, 2, 3], min_tokens=2, stop_ids=(17,))
    text, values = [1, 2, 3], logits()
    for token in (40, 41, 42):
        wanted = reference(torch.tensor([text]), values.clone())
        assert torch.equal(applied(constraint, values[0]), wanted[0])
        constraint.accept(token)
        text.append(token)


def test_penalties_come_before_the_bias_and_bans_win(constraints):
    constraint = make(
        constraints,
        [5],
        repetition_penalty=2.0,
        presence_penalty=1.0,
        logit_bias=((5, 10.0), (6, 50.0)),
        bad_ids=(6,),
    )
    values = torch.zeros(VOCABULARY)
    values[5] = 4.0
    assert applied(constraint, values)[5] == 4.0 / 2 + 10
    constraint.accept(5)
    assert applied(constraint, values)[5] == 4.0 / 2 - 1 + 10
    assert applied(constraint, values)[6] == -torch.inf


def test_the_thinking_block_is_not_closed_before_min_thinking(constraints, tokenizer):
    close, ends = tokenizer.special(THINK_END), {tokenizer.eos_id, tokenizer.pad_id}
    constraint = make(constraints, [1, tokenizer.special(THINK)], min_thinking=2)
    for _ in range(2):
        assert banned(constraint) == {close, *ends}
        constraint.accept(40)
    assert banned(constraint) == set()
    # What is forced is accepted all the same, and an answer is free.
    constraint.rollback(2)
    assert banned(constraint) == {close, *ends}
    constraint.accept(close)
    assert banned(constraint) == set()
    assert banned(make(constraints, [1, 2], min_thinking=2)) == set()


def test_taking_back_tokens_leaves_no_trace(constraints, tokenizer):
    fields = {
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "min_tokens": 4,
        "min_thinking": 3,
    }
    prompt = [1, 2, tokenizer.special(THINK)]
    rng = np.random.default_rng(0)
    constraint = make(constraints, prompt, **fields)
    kept, values = [], logits()[0]
    for _ in range(40):
        tokens = rng.integers(0, 100, rng.integers(1, 6)).tolist()
        for token in tokens:
            constraint.accept(token)
        back = int(rng.integers(0, len(tokens) + 1))
        constraint.rollback(back)
        kept += tokens[: len(tokens) - back]
        fresh = make(constraints, prompt, **fields)
        for token in kept:
            fresh.accept(token)
        assert torch.equal(applied(constraint, values), applied(fresh, values))


def test_many_rows_at_once_are_as_each_alone(constraints, tokenizer):
    asked = [
        None,
        make(constraints, [4, 5], repetition_penalty=1.2, logit_bias=((4, 1.0),)),
        make(constraints, bad_ids=(1, 2, 3)),
        None,
        make(constraints, [4, 5], presence_penalty=0.5, min_tokens=1),
    ]
    for constraint in asked:
        if constraint is not None:
            constraint.accept(4)
    values = logits(7)
    together = values.clone()
    apply_all(together, asked, rows=[0, 1, 3, 4, 6])
    for row, constraint in zip([0, 1, 3, 4, 6], asked, strict=True):
        alone = values[row] if constraint is None else applied(constraint, values[row])
        assert torch.equal(together[row], alone)
    assert torch.equal(together[[2, 5]], values[[2, 5]])


def test_rows_behind_drafts_are_as_if_the_drafts_had_been_accepted(constraints):
    fields = {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "bad_ids": (6,), "min_tokens": 2}
    constraint, other = make(constraints, **fields), make(constraints, presence_penalty=1.0)
    drafts = [7, 7, 8]
    values = logits(5)
    together = values.clone()
    apply_all(together, [constraint, other], rows=[0, 4], drafts=[drafts, []])
    twin = make(constraints, **fields)
    for row, token in enumerate([*drafts, 0]):
        assert torch.equal(together[row], applied(twin, values[row]))
        twin.accept(token)
    # Nothing is drawn behind a draft that cannot be drawn.
    again = values.clone()
    apply_all(again, [constraint], drafts=[[7, 6, 8]])
    assert torch.equal(again[:2], together[:2])
    assert torch.equal(again[2:], values[2:])


def test_what_no_request_may_ask_is_refused_with_value_and_limit():
    cases = {
        "presence_penalty": (2.5, "presence_penalty 2.5"),
        "frequency_penalty": (-3.0, "frequency_penalty -3.0"),
        "repetition_penalty": (0.0, "repetition_penalty 0.0"),
        "logit_bias": (((1, 101.0),), "logit_bias for token 1 of 101.0"),
        "bad_ids": ((VOCABULARY,), f"bad_ids {VOCABULARY}"),
        "min_tokens": (9, "min_tokens 9"),
        "min_thinking": (-1, "min_thinking -1"),
        "top_logprobs": (21, "top_logprobs 21"),
        "stop": (("x",) * 17, "number of stop strings 17"),
    }
    for field, (value, message) in cases.items():
        with pytest.raises(ModelError, match=message):
            checked_prompt(Request("r", [1], SamplingParams(max_tokens=8, **{field: value})), VOCABULARY, 100)
    for fields, message in (
        ({"stop": ("x" * 257,)}, "length of 257"),
        ({"stop": ("",)}, "length of 0"),
        ({"logit_bias": ((400, 1.0),)}, "token 400"),
        ({"logit_bias": ((4, 1.0), (4, 2.0))}, "twice"),
        ({"logit_bias": ((4, float("nan")),)}, "nan"),
        ({"min_thinking": 3, "thinking_budget": 2}, "above its thinking_budget 2"),
    ):
        with pytest.raises(ModelError, match=message):
            checked_prompt(Request("r", [1], SamplingParams(max_tokens=8, **fields)), VOCABULARY, 100)


def test_min_thinking_needs_a_tokenizer_that_thinks():
    blind = Constraints(VOCABULARY, None, None, ())
    with pytest.raises(ModelError, match="min_thinking 2"):
        make(blind, min_thinking=2)
    constraint = make(blind, bad_ids=(3,))
    assert banned(constraint) == {3}


def test_looking_ahead_moves_the_phases_as_counting_does(tokenizer):
    thinking = Thinking(tokenizer)
    rng = np.random.default_rng(1)
    tags = [thinking.open_id, thinking.close_id, *tokenizer.encode("\n"), *tokenizer.encode("cat")]
    for _ in range(50):
        state = np.zeros(1, [("phase", np.int64), ("reasoning", np.int64), ("budget", np.int64)])
        phase = 0
        for token in rng.choice(tags, 8).tolist():
            thinking.count(state, slice(0, 1), np.array([token]), np.array([False]))
            phase = thinking.after(phase, token)
            assert phase == state["phase"][0]
