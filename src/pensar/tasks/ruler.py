"""A small RULER: a needle, needles among needles, and chains of variables in long texts (arXiv 2404.06654).

The texts are lines of worked problems with a few lines `name=code` among them. A question is a name at the end of the
text, its answer what the text says of it. They ask of a small model what RULER asks of a large one: to find one line,
to tell it from others like it, and to follow names that stand for other names.
"""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from pensar.base.errors import ConfigError
from pensar.tasks.families import FAMILIES
from pensar.tasks.instructions import NAMES
from pensar.tasks.task import Task, task_id

Kind = Literal["needle", "multi-needle", "variables"]
Length = Callable[[str], int]
"""Text -> its number of tokens."""

KINDS: tuple[Kind, ...] = ("needle", "multi-needle", "variables")
CODES = "abcdefghijklmnop"
NUM_NEEDLES = 6
"""Of a text with many: one is asked for, the others are like it."""
NUM_CHAINS, NUM_HOPS = 2, 2
"""Chains of variables in a text, and the names between the one asked for and its code."""


def ruler_task(kind: Kind, rng: random.Random, tokens: int, length: Length) -> Task:
    """A text of at most `tokens` tokens, answer included, and as near to them as whole lines allow.

    needle and multi-needle are asked for a code: `amber` is to be answered by `=k`. In variables a name stands for
    another name: with `amber=birch`, `birch=cedar` and `cedar=k` in this order, though not side by side, `amber` is
    to be answered by `=birch=cedar=k`. Raises ConfigError for a length that does not hold the lines themselves.
    """
    groups = _planted(kind, rng)
    asked = rng.choice(groups)
    text, answer = _text(groups, [_question(asked)], rng, tokens, length)
    return Task(id=task_id(f"ruler-{kind}", text), family=f"ruler-{kind}", prompt=text, answer=answer)


def ruler_text(kind: Kind, rng: random.Random, tokens: int, length: Length) -> str:
    """A text to learn from: as `ruler_task`, with questions at its end, at least four, and their answers.

    All names are asked for, those inside a chain too: who can go on from any name can follow a chain from its start.
    """
    groups = _planted(kind, rng)
    questions = [_question(group[start:]) for group in groups for start in range(len(group) - 1)]
    rng.shuffle(questions)
    questions += rng.choices(questions, k=max(0, 4 - len(questions)))
    text, answer = _text(groups, questions, rng, tokens, length)
    return text + answer


def _planted(kind: Kind, rng: random.Random) -> list[list[str]]:
    """Groups of names, each group with the code that it leads to as its last entry."""
    sizes = {"needle": [1], "multi-needle": [1] * NUM_NEEDLES, "variables": [NUM_HOPS + 1] * NUM_CHAINS}[kind]
    names = rng.sample(NAMES, sum(sizes))
    return [[*(names.pop() for _ in range(size)), rng.choice(CODES)] for size in sizes]


def _question(group: list[str]) -> tuple[str, str]:
    name, *rest = group
    return name, "".join(f"={step}" for step in rest)


def _text(
    groups: list[list[str]],
    questions: list[tuple[str, str]],
    rng: random.Random,
    tokens: int,
    length: Length,
) -> tuple[str, str]:
    """The lines with as much filling as fits, the questions, all answered but the last; and its answer."""
    (*before, (last, answer)) = questions
    end = "".join(f"\n{name}{reply}" for name, reply in before) + f"\n{last}"
    planted = [[f"{name}={value}" for name, value in pairwise(group)] for group in groups]
    left = (
        tokens
        - length(end)
        - length(answer)
        - sum(length(f"{line}\n") for lines in planted for line in lines)
    )
    if left < 0:
        raise ConfigError(
            f"{tokens} tokens do not hold {sum(map(len, planted))} lines and their questions; {tokens - left} do"
        )
    filling: list[str] = []
    while left > 0:
        line = FAMILIES[rng.choice(("chain", "logic"))][0](rng, rng.randint(1, 3)).solution
        left -= length(f"{line}\n")
        filling.append(line)
    if left < 0:
        filling.pop()
    return "\n".join(_merged(planted, filling, rng)) + end, answer


def _merged(planted: list[list[str]], filling: list[str], rng: random.Random) -> list[str]:
    """All lines, those of a group in order, otherwise at any depth."""
    num = sum(map(len, planted)) + len(filling)
    owners = rng.sample([index for index, lines in enumerate(planted) for _ in lines], k=num - len(filling))
    places = dict(zip(sorted(rng.sample(range(num), num - len(filling))), owners, strict=True))
    rest, groups = iter(filling), [iter(lines) for lines in planted]
    return [next(groups[places[place]]) if place in places else next(rest) for place in range(num)]
