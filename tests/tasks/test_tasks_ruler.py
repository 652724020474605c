"""The small RULER: texts of the length asked for, whose own lines lead from the question to the answer."""

import random
import re

import pytest

from pensar.base.errors import ConfigError
from pensar.tasks.ruler import CODES, KINDS, NUM_CHAINS, NUM_HOPS, NUM_NEEDLES, ruler_task, ruler_text
from pensar.tasks.verifiers import gold, verify
from pensar.text.conversation import Message

every_kind = pytest.mark.parametrize("kind", KINDS)


def words(text):
    """A stand-in for a tokenizer whose tokens do not cross lines."""
    return len(re.findall(r"\w+|[^\w ]", text))


def planted(prompt):
    """Name -> what the text says of it, from lines `name=value`; the last line is the question."""
    *lines, asked = prompt.split("\n")
    pairs = [line.split("=") for line in lines]
    return dict(pair for pair in pairs if len(pair) == 2 and pair[0].isalpha() and len(pair[0]) > 1), asked


@every_kind
@pytest.mark.parametrize("tokens", [96, 300, 1_000])
def test_the_text_says_what_is_asked_and_is_as_long_as_asked(kind, tokens):
    for seed in range(40):
        task = ruler_task(kind, random.Random(seed), tokens, words)
        said, name = planted(task.prompt)
        num = {"needle": 1, "multi-needle": NUM_NEEDLES, "variables": NUM_CHAINS * (NUM_HOPS + 1)}[kind]
        assert len(said) == num
        reply, value = "", name
        while value in said:
            value = said[value]
            reply += f"={value}"
        assert reply == task.answer
        assert value in CODES
        assert task.answer.count("=") == (NUM_HOPS + 1 if kind == "variables" else 1)
        assert tokens - 30 < words(task.prompt) + words(task.answer) <= tokens


@every_kind
def test_the_gold_answer_scores_one_and_others_nothing(kind):
    task = ruler_task(kind, random.Random(3), 200, words)
    assert verify(task, gold(task)).value == 1.0
    assert verify(task, [Message(role="assistant", content="")]).value == 0.0
    assert verify(task, [Message(role="assistant", content="=zebra")]).value == 0.0


@every_kind
def test_equal_seeds_give_equal_tasks_and_others_differ(kind):
    first = [ruler_task(kind, random.Random(seed), 200, words) for seed in range(30)]
    assert first == [ruler_task(kind, random.Random(seed), 200, words) for seed in range(30)]
    assert len({task.id for task in first}) == 30


def test_needles_lie_at_every_depth():
    depths = []
    for seed in range(400):
        lines = ruler_task("needle", random.Random(seed), 400, words).prompt.split("\n")[:-1]
        (place,) = [
            i for i, line in enumerate(lines) if line.split("=")[0] in planted("\n".join([*lines, ""]))[0]
        ]
        depths.append(place / (len(lines) - 1))
    assert min(depths) == 0 and max(depths) == 1  # noqa: PT018
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.05)


@every_kind
def test_a_text_to_learn_from_answers_each_of_its_questions(kind):
    text = ruler_text(kind, random.Random(5), 300, words)
    task_lines = text.split("\n")
    *_, last = task_lines
    said, _ = planted("\n".join([*task_lines[:-4], ""]))
    name, *reply = last.split("=")
    for value in reply:
        assert said[name] == value
        name = value
    assert words(text) <= 300


def test_a_text_to_learn_from_asks_for_every_name_those_inside_a_chain_too():
    lines = ruler_text("variables", random.Random(5), 300, words).split("\n")
    num = NUM_CHAINS * (NUM_HOPS + 1)
    said, _ = planted("\n".join([*lines[:-num], ""]))
    asked = dict(line.split("=", 1) for line in lines[-num:])
    assert asked.keys() == said.keys()
    lengths = sorted(reply.count("=") for reply in asked.values())
    assert lengths == sorted(list(range(NUM_HOPS + 1)) * NUM_CHAINS)


def test_a_length_that_holds_no_text_is_refused():
    with pytest.raises(ConfigError, match="10 tokens do not hold 6 lines"):
        ruler_task("variables", random.Random(0), 10, words)
