"""Problem families whose answer takes several steps: arithmetic and logic chains, and the parity of bits.

Each function draws one task of a given difficulty (the number of steps) from a random generator. Solutions are
written in the compact form in which a small model can both read and write them.
"""

import operator
import random
import string
from collections.abc import Callable

from pensar.tasks.task import Split, Task, split_of, task_id

Family = Callable[[random.Random, int], Task]

_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_LOGIC: dict[str, Callable[[bool, bool], bool]] = {
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "xor": lambda a, b: a != b,
}


def chain(rng: random.Random, steps: int) -> Task:
    """One-digit operations from left to right; only the last digit is kept after each step."""
    value = rng.randrange(10)
    expression, solution = str(value), str(value)
    for _ in range(steps):
        symbol, operand = rng.choice("+-*"), rng.randrange(10)
        value = _ARITHMETIC[symbol](value, operand) % 10
        expression += f"{symbol}{operand}"
        solution += f"{symbol}{operand}={value}"
    return _task("chain", steps, f"Last digit, left to right: {expression}", str(value), solution)


def logic(rng: random.Random, steps: int) -> Task:
    """Truth values joined by and, or, xor, read from left to right."""
    value = rng.random() < 0.5
    expression = solution = _truth(value)
    for _ in range(steps):
        word, operand = rng.choice(tuple(_LOGIC)), rng.random() < 0.5
        value = _LOGIC[word](value, operand)
        expression += f" {word} {_truth(operand)}"
        solution += f" {word} {_truth(operand)}={_truth(value)}"
    return _task("logic", steps, f"True or false, left to right: {expression}", _truth(value), solution)


def parity(rng: random.Random, steps: int) -> Task:
    """Whether the number of ones among lettered binary digits is even or odd, kept while reading them.

    The letters say which digit a step of the solution has come to: in bare digits all ones look alike.
    """
    seen, shown, parts = 0, [], []
    for letter in string.ascii_lowercase[:steps]:
        bit = rng.randrange(2)
        seen += bit
        shown.append(f"{letter}{bit}")
        parts.append(f"{shown[-1]}={_even(seen)}")
    return _task(
        "parity", steps, f"Even or odd number of ones: {' '.join(shown)}", _even(seen), " ".join(parts)
    )


FAMILIES: dict[str, tuple[Family, int, int]] = {
    "chain": (chain, 2, 6),
    "logic": (logic, 2, 6),
    "parity": (parity, 4, 10),
}
"""Family -> its generator and the difficulties of its train, validation and test problems."""


def draw(family: str, split: Split, rng: random.Random) -> Task:
    """A task of the family that belongs to the split, its difficulty uniform over the family's range."""
    generate, low, high = FAMILIES[family]
    while True:
        task = generate(rng, rng.randint(low, high))
        if split_of(task.prompt) == split:
            return task


def _even(number: int) -> str:
    return "odd" if number % 2 else "even"


def _truth(value: bool) -> str:
    return "T" if value else "F"


def _task(family: str, steps: int, prompt: str, answer: str, solution: str) -> Task:
    return Task(
        id=task_id(family, prompt),
        family=family,
        prompt=prompt,
        answer=answer,
        solution=solution,
        difficulty=steps,
    )
