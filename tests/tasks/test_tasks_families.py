"""Problem families: answers against an independent evaluator, and splits that never meet."""

import random
import re
from collections.abc import Callable

import pytest

from pensar.tasks.families import FAMILIES, draw
from pensar.tasks.task import Split, Task, split_of

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def drawn(family: str, num: int = 60) -> list[Task]:
    """Tasks of every difficulty from one to nine steps."""
    rng = random.Random(7)
    return [FAMILIES[family][0](rng, 1 + index % 9) for index in range(num)]


def chain_results(shown: str) -> list[str]:
    """The value so far as Python sees it: the last digit of a sum or product needs the last digits alone."""
    values = [int(shown[0])]
    for symbol, operand in re.findall(r"([-+*])(\d)", shown[1:]):
        values.append(eval(f"({values[-1]}){symbol}({operand})"))
    return [str(value % 10) for value in values]


def logic_results(shown: str) -> list[str]:
    words = shown.split()
    truth = words[0] == "T"
    results = [words[0]]
    for word, operand in zip(words[1::2], words[2::2], strict=True):
        other = operand == "T"
        truth = {"and": truth & other, "or": truth | other, "xor": truth ^ other}[word]
        results.append("T" if truth else "F")
    return results


def parity_results(shown: str) -> list[str]:
    digits = [lettered[1:] for lettered in shown.split()]
    return [("even", "odd")[digits[: end + 1].count("1") % 2] for end in range(len(digits))]


EVALUATORS: dict[str, Callable[[str], list[str]]] = {
    "chain": chain_results,
    "logic": logic_results,
    "parity": parity_results,
}
"""Family -> every intermediate result, worked out from what stands after the colon of the prompt alone."""


def evaluated(task: Task) -> list[str]:
    return EVALUATORS[task.family](task.prompt.rpartition(": ")[2])


def test_every_family_has_its_independent_evaluator() -> None:
    assert set(FAMILIES) == set(EVALUATORS)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_an_independent_evaluator(family: str) -> None:
    for task in drawn(family):
        assert task.answer == evaluated(task)[-1], task.prompt
        assert task.family == family


@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_show_every_step_and_end_with_the_answer(family: str) -> None:
    for task in drawn(family):
        shown = re.findall(r"=(\w+)", task.solution)
        assert shown == evaluated(task)[-len(shown) :]
        assert task.difficulty == len(shown)


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
