"""Problem families: answers against an independent evaluator, and splits that never meet."""

import operator
import random
import re

import pytest

from pensar.tasks.families import FAMILIES, draw
from pensar.tasks.task import Split, Task, split_of

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def drawn(family: str, num: int = 60) -> list[Task]:
    """Tasks of every difficulty from one to nine steps."""
    rng = random.Random(7)
    return [FAMILIES[family][0](rng, 1 + index % 9) for index in range(num)]


def evaluated(task: Task) -> list[str]:
    """Every intermediate result of a prompt, worked out from its text alone, the starting value first."""
    if task.family == "walk":
        listed, start, steps = re.search(r"Arrows (\S+)\. From (\d) go (\d+)", task.prompt).groups()  # type: ignore[union-attr]
        arrows = {pair[0]: pair[2] for pair in listed.split(",")}
        results = [start]
        for _ in range(int(steps)):
            results.append(arrows[results[-1]])
        return results
    expression = task.prompt.rpartition(": ")[2]
    if task.family == "chain":
        value = int(expression[0])
        results = [str(value)]
        for symbol, operand in re.findall(r"([-+*])(\d)", expression[1:]):
            value = OPERATIONS[symbol](value, int(operand)) % 10
            results.append(str(value))
        return results
    words = expression.split()
    truth = words[0] == "T"
    results = [words[0]]
    for word, operand in zip(words[1::2], words[2::2], strict=True):
        other = operand == "T"
        truth = {"and": truth & other, "or": truth | other, "xor": truth ^ other}[word]
        results.append("T" if truth else "F")
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_an_independent_evaluator(family: str) -> None:
    for task in drawn(family):
        assert task.answer == evaluated(task)[-1], task.prompt
        assert task.family == family


@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_show_every_step_and_end_with_the_answer(family: str) -> None:
    for task in drawn(family):
        separator = ">" if family == "walk" else "="
        shown = [part.strip()[0] for part in task.solution.split(separator)]
        assert shown == evaluated(task)
        assert task.difficulty == len(shown) - 1


def test_a_whole_chain_modulo_ten_is_python_s_own_arithmetic() -> None:
    """The last digit after each step is that of the unreduced value, since + - * respect the modulus."""
    for task in drawn("chain"):
        expression = task.prompt.rpartition(": ")[2]
        value = int(expression[0])
        for symbol, operand in re.findall(r"([-+*])(\d)", expression[1:]):
            value = eval(f"({value}){symbol}({operand})")
        assert task.answer == str(value % 10)


def test_a_walk_is_a_ring_of_five() -> None:
    for task in drawn("walk"):
        arrows = re.findall(r"(\d)>(\d)", task.prompt)
        assert len(arrows) == 5
        assert {a for a, _ in arrows} == {b for _, b in arrows}
        assert len({a for a, _ in arrows}) == 5
        assert evaluated(Task(id="", family="walk", prompt=task.prompt[:-1] + "5", answer=""))[-1] == (
            re.search(r"From (\d)", task.prompt).group(1)  # type: ignore[union-attr]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_draws_the_same_task(family: str) -> None:
    assert [draw(family, "train", random.Random(n)) for n in range(20)] == [
        draw(family, "train", random.Random(n)) for n in range(20)
    ]


def test_splits_are_disjoint_and_of_the_stated_sizes() -> None:
    prompts = {
        split: {
            draw(family, split, random.Random(n)).prompt
            for family in FAMILIES
            for n in range(300 if split == "train" else 40)
        }
        for split in SPLITS
    }
    for split, texts in prompts.items():
        assert all(split_of(text) == split for text in texts)
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]
    shares = [split_of(f"text {n}") for n in range(4000)]
    assert abs(shares.count("test") / 4000 - 26 / 256) < 0.02
    assert abs(shares.count("validation") / 4000 - 13 / 256) < 0.02


def test_difficulties_stay_in_the_family_s_range() -> None:
    for family, (_, low, high) in FAMILIES.items():
        found = {draw(family, "train", random.Random(n)).difficulty for n in range(200)}
        assert found == set(range(low, high + 1))
