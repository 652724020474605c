"""Rollouts: tokens in and tokens out over several turns, and likelihoods that are the trainer's own."""

import msgspec
import numpy as np
import pytest
import torch

from pensar.base.ranks import World
from pensar.infer.engine import Engine
from pensar.infer.rollout import Rollout, RolloutConfig, prompt_mode, roll
from pensar.model.attention import Packed
from pensar.model.qwen3 import Qwen3
from pensar.tasks.task import Task
from pensar.tasks.tools import LOOKUP
from pensar.text.chat import EMPTY_THINKING, encode_prompt, encode_stop_sentence, render
from pensar.text.conversation import Conversation, Message
from pensar.text.packing import one_per_row
from pensar.text.tokenizer import Tokenizer
from pensar.train.loss import LossConfig, batch_loss, weights_of
from tiny import taught

LOOK = Task(
    id="look",
    family="tools",
    prompt="What is the code of amber?",
    answer="42",
    verifier="tool",
    arguments={"call": {"name": "lookup", "arguments": {"words": "amber"}}},
    tools=(LOOKUP,),
    environment={"amber": "42"},
)
GUESS = Task(id="guess", family="logic", prompt="True or false, left to right: T and F", answer="F")
RESPONSE = "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model() -> Qwen3:
    return taught()[0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return taught()[1]


@pytest.fixture(scope="module")
def engine(model: Qwen3, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, slots=16)


def mode(task: Task, thinking: bool) -> Task:
    return msgspec.structs.replace(task, thinking=thinking)


def runs_of(rollout: Rollout) -> list[list[int]]:
    """The tokens of each uninterrupted stretch of sampled ones."""
    runs: list[list[int]] = []
    for index, (token, sampled) in enumerate(zip(rollout.tokens, rollout.sampled, strict=True)):
        if sampled and (not runs or not rollout.sampled[index - 1]):
            runs.append([])
        if sampled:
            runs[-1].append(token)
    return runs


def test_a_tool_task_goes_over_two_turns_and_only_what_was_sampled_is_learned(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    (rollout,) = roll(engine, tokenizer, [mode(LOOK, True)], RolloutConfig(temperature=0.0), [1])
    assert rollout.score.value == 1.0
    assert [turn.role for turn in rollout.turns] == ["assistant", "tool", "assistant"]
    first, second = (tokenizer.decode(run) for run in runs_of(rollout))
    assert first == (
        "<think>\nlookup amber\n</think>\n\n"
        '<tool_call>\n{"name": "lookup", "arguments": {"words": "amber"}}\n</tool_call><|im_end|>'
    )
    assert second.startswith("<think>\n")
    assert second.endswith("</think>\n\n42<|im_end|>")
    given = tokenizer.decode([t for t, s in zip(rollout.tokens, rollout.sampled, strict=True) if not s])
    prompt = tokenizer.decode(encode_prompt(tokenizer, LOOK.conversation()))
    assert given == prompt + RESPONSE
    assert tokenizer.decode(rollout.tokens) == prompt + first + RESPONSE + second
    whole = Conversation(messages=(*LOOK.conversation().messages, *rollout.turns), tools=LOOK.tools)
    assert tokenizer.decode(rollout.tokens) + "\n" == render(whole)
    row = rollout.sample(-0.5)
    assert (row.pg == np.where(rollout.sampled, np.float32(-0.5), 0)).all()
    assert (rollout.taught().kl == np.asarray(rollout.sampled)).all()
    assert rollout.num_sampled == sum(len(run) for run in runs_of(rollout))


def test_without_thinking_every_turn_is_given_the_empty_block(engine: Engine, tokenizer: Tokenizer) -> None:
    """As the server does: the mode of a request holds for each of its prompts."""
    (rollout,) = roll(engine, tokenizer, [mode(LOOK, False)], RolloutConfig(temperature=0.0), [1])
    text = tokenizer.decode(rollout.tokens)
    assert text.count(EMPTY_THINKING) == 2
    first, second = (tokenizer.decode(run) for run in runs_of(rollout))
    assert first.startswith("<tool_call>")
    assert second.endswith("<|im_end|>")
    assert f"{first}{RESPONSE}{EMPTY_THINKING}{second}" in text
    asked = Conversation(messages=(*LOOK.conversation().messages, *rollout.turns[:2]), tools=LOOK.tools)
    served = tokenizer.decode(encode_prompt(tokenizer, asked, thinking=False))
    assert served.endswith(f"</tool_call><|im_end|>{RESPONSE}{EMPTY_THINKING}")


def test_the_engine_s_likelihoods_are_those_of_a_full_forward_pass(
    model: Qwen3, engine: Engine, tokenizer: Tokenizer
) -> None:
    tasks = [mode(LOOK, True), mode(LOOK, False), mode(GUESS, True), mode(GUESS, False), GUESS]
    rollouts = roll(engine, tokenizer, tasks, RolloutConfig(max_tokens=48), range(5))
    for rollout in rollouts:
        ids = torch.tensor([rollout.tokens])
        with torch.no_grad():
            logits = model.logits(model(ids, torch.arange(ids.shape[1])[None], Packed())[0])
        logprobs = logits.double().log_softmax(-1)
        for index, (token, sampled) in enumerate(zip(rollout.tokens, rollout.sampled, strict=True)):
            expected = float(logprobs[index - 1, token]) if sampled else 0.0
            assert rollout.logprobs[index] == pytest.approx(expected, abs=1e-4)
    rows = one_per_row([rollout.sample(1.0) for rollout in rollouts])
    _, totals = batch_loss(model, rows, weights_of([rows], World()), LossConfig())
    assert totals.pg_weight == sum(rollout.num_sampled for rollout in rollouts)
    assert totals.mismatch / totals.pg_weight < 1e-4
    assert totals.clipped == 0


def test_a_draw_depends_on_its_seed_and_not_on_its_neighbours(engine: Engine, tokenizer: Tokenizer) -> None:
    config = RolloutConfig(max_tokens=48)
    tasks = [mode(GUESS, True), mode(LOOK, True), mode(GUESS, False), mode(GUESS, True)]
    together = roll(engine, tokenizer, tasks, config, [5, 6, 7, 8])
    for task, seed, rollout in zip(tasks, (5, 6, 7, 8), together, strict=True):
        (alone,) = roll(engine, tokenizer, [task], config, [seed])
        assert alone.tokens == rollout.tokens
        assert alone.score == rollout.score
    assert len({tuple(r.tokens) for r in roll(engine, tokenizer, [GUESS] * 8, config, range(8))}) > 1
    assert roll(engine, tokenizer, [], config, []) == []


def test_a_reply_cut_short_scores_nothing(engine: Engine, tokenizer: Tokenizer) -> None:
    (rollout,) = roll(engine, tokenizer, [mode(GUESS, True)], RolloutConfig(max_tokens=4), [1])
    assert rollout.finish == "length"
    assert rollout.score.reason == "unfinished"
    assert rollout.record()["score"] == 0.0


def test_calls_beyond_the_limit_end_without_an_answer(engine: Engine, tokenizer: Tokenizer) -> None:
    config = RolloutConfig(temperature=0.0, max_calls=0)
    (rollout,) = roll(engine, tokenizer, [mode(LOOK, True)], config, [1])
    assert [turn.role for turn in rollout.turns] == ["assistant", "tool"]
    assert rollout.score.reason == "no answer"


def test_forced_tokens_of_the_budget_are_not_learned(engine: Engine, tokenizer: Tokenizer) -> None:
    config = RolloutConfig(temperature=0.0, thinking_budget=2, max_tokens=80)
    (rollout,) = roll(engine, tokenizer, [mode(GUESS, True)], config, [1])
    sentence = encode_stop_sentence(tokenizer)
    text = ",".join(map(str, rollout.tokens))
    start = text[: text.index(",".join(map(str, sentence)))].count(",")
    forced = slice(start, start + len(sentence))
    assert rollout.tokens[forced] == sentence
    assert not any(rollout.sampled[forced])
    assert all(rollout.sampled[start + len(sentence) :])
    assert not (rollout.sample(1.0).pg[forced]).any()


def test_the_empty_block_is_given_only_where_no_flag_asks_for_it() -> None:
    assert prompt_mode(GUESS) is None
    assert prompt_mode(mode(GUESS, True)) is None
    assert prompt_mode(mode(GUESS, False)) is False
    flag = msgspec.structs.replace(mode(GUESS, False), prompt=f"{GUESS.prompt} /no_think")
    assert prompt_mode(flag) is None
    earlier = (Message(role="user", content="? /no_think"), Message(role="assistant", content="T"))
    assert prompt_mode(msgspec.structs.replace(mode(GUESS, False), history=earlier)) is None
