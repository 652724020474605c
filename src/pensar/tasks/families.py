"""Problem families whose answer takes several steps: arithmetic and logic chains, and walks along arrows.

Each function draws one task of a given difficulty (the number of steps) from a random generator. Solutions are
written in the compact form in which a small model can both read and write them.
"""

import operator
import random
from collections.abc import Callable

from pensar.tasks.task import Task, split_of, task_id

Family = Callable[[random.Random, int], Task]

_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_LOGIC: dict[str, Callable[[bool, bool], bool]] = {
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "xor": lambda a, b: a != b,
}
_NODES = "0123456789"


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


def walk(rng: random.Random, steps: int) -> Task:
    """Follow the arrows of a ring of five digits for a number of steps."""
    nodes = rng.sample(_NODES, 5)
    targets = nodes[1:] + nodes[:1]
    arrows = dict(zip(nodes, targets, strict=True))
    shown = rng.sample(nodes, len(nodes))
    start = node = rng.choice(nodes)
    solution = start
    for _ in range(steps):
        node = arrows[node]
        solution += f">{node}"
    listed = ",".join(f"{a}>{arrows[a]}" for a in shown)
    return _task("walk", steps, f"Arrows {listed}. From {start} go {steps}", node, solution)


FAMILIES: dict[str, tuple[Family, int, int]] = {
    "chain": (chain, 2, 8),
    "logic": (logic, 2, 8),
    "walk": (walk, 2, 5),
}
"""Family -> its generator and the difficulties of its train, validation and test problems."""


def draw(family: str, split: str, rng: random.Random) -> Task:
    """A task of the family that belongs to the split, its difficulty uniform over the family's range."""
    generate, low, high = FAMILIES[family]
    while True:
        task = generate(rng, rng.randint(low, high))
        if split_of(task.prompt) == split:
            return task


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
