import numpy as np
import pytest

from pensar.infer.budget import ANSWER, BEGINNING, NO_BUDGET, THINKING, Thinking
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.rows import FIELDS
from pensar.text.chat import STOP_SENTENCE, encode_prompt, encode_stop_sentence
from pensar.text.conversation import Conversation, Message
from pensar.text.tokenizer import THINK, THINK_END, TURN_START


def machine_run(thinking, prompt, sampled, budget=NO_BUDGET, stops=()):
    """The machine on one row whose model samples `sampled`: the tokens that come out, forced flags, count."""
    row = np.zeros(1, FIELDS)
    row["phase"], row["budget"] = thinking.phase_of(np.asarray(prompt)), budget
    out, flags = [], []
    for token in sampled:
        ids, all_rows = np.asarray([token]), slice(0, 1)
        if thinking.spent(row, all_rows, ids)[0]:
            out += thinking.stop_sentence.tolist()
            flags += [True] * len(thinking.stop_sentence)
            thinking.close(row, 0)
            continue
        thinking.count(row, all_rows, ids, np.isin(ids, stops))
        out.append(token)
        flags.append(False)
    return out, flags, int(row["reasoning"][0])


@pytest.fixture
def thinking(tokenizer):
    return Thinking(tokenizer)


def open_prompt(tokenizer):
    return [tokenizer.special(TURN_START), *tokenizer.encode("assistant\n"), tokenizer.special(THINK)]


@pytest.mark.parametrize("budget", [0, 1, 5, 30, 200, None])
def test_a_budget_closes_the_thinking_as_a_naive_generation_with_the_stop_sentence_does(
    model, tokenizer, naive, budget
):
    stops = (tokenizer.eos_id, tokenizer.pad_id)
    prompts = [
        [*open_prompt(tokenizer), *tokenizer.encode(text)]
        for text in ("the cat", "one and two", "considering")
    ]
    params = SamplingParams(max_tokens=140, thinking_budget=budget)
    completions = Engine(model, tokenizer).run([Request(str(i), p, params) for i, p in enumerate(prompts)])
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = naive(model, prompt, 140, stops, budget)
        assert completion.tokens == expected["tokens"]
        assert completion.forced == expected["forced"]
        assert completion.finish_reason == expected["finish"]
        assert completion.num_reasoning_tokens == expected["reasoning"]
        if budget is not None and any(completion.forced):
            start = completion.forced.index(True)
            sentence = [t for t, forced in zip(completion.tokens, completion.forced, strict=True) if forced]
            assert start == completion.num_reasoning_tokens == budget
            assert tokenizer.decode(sentence) == STOP_SENTENCE
            assert sentence.count(tokenizer.special(THINK_END)) == 1


def test_different_budgets_share_a_batch_and_forced_tokens_have_their_logprobs(
    model, tokenizer, naive, full_logprobs
):
    prompt = open_prompt(tokenizer)
    stops = (tokenizer.eos_id, tokenizer.pad_id)
    budgets = [0, 3, None, 7]
    requests = [
        Request(str(i), prompt, SamplingParams(max_tokens=60, thinking_budget=budget, logprobs=True))
        for i, budget in enumerate(budgets)
    ]
    for budget, completion in zip(budgets, Engine(model, tokenizer).run(requests), strict=True):
        assert completion.tokens == naive(model, prompt, 60, stops, budget)["tokens"]
        assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.tokens), abs=1e-5)


def test_max_tokens_cuts_the_stop_sentence(model, tokenizer):
    params = SamplingParams(max_tokens=6, thinking_budget=2)
    [completion] = Engine(model, tokenizer).run([Request("a", open_prompt(tokenizer), params)])
    assert completion.forced == [False, False, True, True, True, True]
    assert completion.tokens[2:] == encode_stop_sentence(tokenizer)[:4]
    assert (completion.finish_reason, completion.num_reasoning_tokens) == ("length", 2)


def test_a_stop_token_inside_the_stop_sentence_does_not_end_the_reply(model, tokenizer):
    sentence = encode_stop_sentence(tokenizer)
    params = SamplingParams(
        max_tokens=len(sentence) + 1, thinking_budget=0, stop_ids=(sentence[0], sentence[-1])
    )
    [completion] = Engine(model, tokenizer).run([Request("a", open_prompt(tokenizer), params)])
    assert completion.tokens[: len(sentence)] == sentence


def test_a_budget_has_no_effect_with_thinking_off(model, tokenizer):
    conversation = Conversation(messages=(Message(role="user", content="the cat"),))
    prompt = encode_prompt(tokenizer, conversation, thinking=False)
    with_budget, without = Engine(model, tokenizer).run(
        [
            Request("a", prompt, SamplingParams(max_tokens=30, thinking_budget=0)),
            Request("b", prompt, SamplingParams(max_tokens=30)),
        ]
    )
    assert with_budget.tokens == without.tokens
    assert with_budget.num_reasoning_tokens == 0
    assert not any(with_budget.forced)


def test_the_phase_of_a_prompt_is_read_from_its_last_turn(thinking, tokenizer):
    conversation = Conversation(messages=(Message(role="user", content="say <think> please"),))
    opened = encode_prompt(tokenizer, conversation)
    assert thinking.phase_of(np.asarray(opened)) == BEGINNING
    assert thinking.phase_of(np.asarray([*opened, thinking.open_id, 5])) == THINKING
    assert thinking.phase_of(np.asarray([thinking.open_id, 5, *opened])) == BEGINNING
    off = encode_prompt(tokenizer, conversation, thinking=False)
    assert thinking.phase_of(np.asarray(off)) == ANSWER
    assert thinking.phase_of(np.asarray([5, thinking.open_id, 6])) == THINKING


def test_a_block_that_the_model_opens_itself_is_counted_and_cut(thinking, tokenizer):
    prompt = open_prompt(tokenizer)[:-1]
    word, *_ = tokenizer.encode("cat")
    blank, *_ = tokenizer.encode("\n")
    opened = [blank, thinking.open_id, word, word, word]
    assert machine_run(thinking, prompt, opened) == (opened, [False] * 5, 3)
    sentence = thinking.stop_sentence.tolist()
    cut = machine_run(thinking, prompt, [*opened, word, word], budget=2)
    assert cut == (
        [*opened[:4], *sentence, word, word],
        [False] * 4 + [True] * len(sentence) + [False] * 2,
        2,
    )


def test_a_block_that_closes_itself_with_exactly_the_budget_is_left_alone(thinking, tokenizer):
    word, *_ = tokenizer.encode("cat")
    reply = [word, word, thinking.close_id, word, word]
    assert machine_run(thinking, open_prompt(tokenizer), reply, budget=2) == (reply, [False] * 5, 2)
    assert machine_run(thinking, open_prompt(tokenizer), reply, budget=1)[1][1]


def test_tags_after_the_beginning_of_an_answer_are_no_reasoning(thinking, tokenizer):
    word, *_ = tokenizer.encode("cat")
    reply = [word, thinking.open_id, word, thinking.close_id]
    assert machine_run(thinking, open_prompt(tokenizer)[:-1], reply, budget=0) == (reply, [False] * 4, 0)
    again = [thinking.open_id, word, thinking.close_id, thinking.open_id, word]
    assert machine_run(thinking, open_prompt(tokenizer)[:-1], again, budget=1)[2] == 1


def test_an_end_of_turn_inside_the_thinking_is_no_reasoning_and_is_replaced_once_the_budget_is_spent(
    thinking, tokenizer
):
    word, *_ = tokenizer.encode("cat")
    end = tokenizer.eos_id
    assert machine_run(thinking, open_prompt(tokenizer), [word, end], stops=[end])[2] == 1
    out, forced, _ = machine_run(thinking, open_prompt(tokenizer), [word, end], budget=1, stops=[end])
    assert (out[1], forced[1]) == (int(thinking.stop_sentence[0]), True)


def test_a_budget_without_a_tokenizer_is_an_error_of_that_request(model):
    [failed] = Engine(model).run([Request("a", [1], SamplingParams(max_tokens=2, thinking_budget=3))])
    assert "thinking_budget 3" in failed.error


def test_every_piece_says_what_is_left_of_the_budget_the_last_one_too(model, tokenizer):
    engine = Engine(model, tokenizer)
    params = SamplingParams(max_tokens=40, thinking_budget=6)
    engine.submit(Request("a", open_prompt(tokenizer), params))
    engine.submit(Request("b", open_prompt(tokenizer), SamplingParams(max_tokens=9)))
    left = {"a": [], "b": []}
    while engine.num_running or engine.num_waiting:
        for piece in engine.step():
            left[piece.id].append(piece.reasoning_left)
    assert left["a"][:6] == [5, 4, 3, 2, 1, 0]
    assert set(left["a"][6:]) == {0}
    assert set(left["b"]) == {None}
