"""The stage that writes the problem sets: queries for each training stage, and the held-out evaluation sets."""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from pensar.base.config import Config
from pensar.base.files import read_jsonl, seed_of, write_jsonl
from pensar.base.stage import Counts, Runtime
from pensar.tasks.families import FAMILIES, draw
from pensar.tasks.instructions import instruction
from pensar.tasks.modes import flagged, mode_task
from pensar.tasks.task import Split, Task, for_reinforcement, task_id
from pensar.tasks.texts import pretraining_texts, recall_text
from pensar.tasks.tools import tool_task

__all__ = ["ATTEMPTS", "ProblemsConfig", "held_out", "pretraining_texts", "run", "statement", "with_mode"]

_FLAGS = re.compile(r"( /(no_)?think)+$")
ATTEMPTS = 50
"""Draws of a problem before a set is left smaller: the family has no more to give."""


class ProblemsConfig(Config, frozen=True, kw_only=True):
    """How many problems each set holds."""

    seed: int = 1
    cold_start: int = 3_000
    reinforcement: int = 3_995
    """The number of query-verifier pairs in the report, section 4.2."""
    general: int = 3_000
    validation: int = 200
    evaluation: int = 300
    recall_lines: int = 24
    """Worked problems in a long recall text; sets its length."""


def run(config: ProblemsConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Writes train/*.jsonl, validation/*.jsonl and evaluation/*.jsonl; no problem of the first is in the others."""
    counts: Counts = {}
    used: set[str] = set()
    barred: set[str] = set()
    plan: list[tuple[str, int, Callable[[random.Random], Task]]] = [
        ("evaluation/reasoning", config.evaluation, lambda rng: _reasoning(rng, "test")),
        ("evaluation/instructions", config.evaluation, lambda rng: instruction(rng, "test")),
        ("evaluation/tools", config.evaluation, lambda rng: tool_task(rng, "test")),
        ("evaluation/think_follow", config.evaluation, lambda rng: mode_task(rng, _reasoning(rng, "test"))),
        ("evaluation/recall", config.evaluation, lambda rng: _recall(rng, config.recall_lines)),
        ("validation/reasoning", config.validation, lambda rng: _reasoning(rng, "validation")),
        ("train/cold_start", config.cold_start, lambda rng: _training(rng, reinforcement=False)),
        ("train/reinforcement", config.reinforcement, lambda rng: _training(rng, reinforcement=True)),
        ("train/general", config.general, _general),
    ]
    for name, num, make in plan:
        training = name.startswith("train/")
        tasks = list(_distinct(num, make, seed_of(config.seed, name), used, barred if training else set()))
        barred |= set() if training else {statement(task) for task in tasks}
        path = out / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, tasks)
        counts[name.replace("/", "_")] = len(tasks)
    return counts


def statement(task: Task) -> str:
    """What makes two tasks the same problem, in whatever mode and with whatever tools: the bare prompt, the answer."""
    return f"{_FLAGS.sub('', task.prompt)}\n{task.answer}"


def held_out(tasks: Path) -> set[str]:
    """Statements of all validation and evaluation problems, which nothing may be trained on."""
    files = [
        path for split in ("validation", "evaluation") for path in sorted((tasks / split).glob("*.jsonl"))
    ]
    return {statement(task) for path in files for task in read_jsonl(path, Task)}


def _distinct(
    num: int, make: Callable[[random.Random], Task], seed: int, used: set[str], barred: set[str]
) -> Iterator[Task]:
    """Up to `num` tasks whose ids were not used before and whose statements are not barred."""
    for index in range(num):
        for attempt in range(ATTEMPTS):
            task = make(random.Random(seed_of(seed, index, attempt)))
            if task.id not in used and statement(task) not in barred:
                used.add(task.id)
                yield task
                break


def _reasoning(rng: random.Random, split: Split) -> Task:
    return draw(rng.choice(tuple(FAMILIES)), split, rng)


def _training(rng: random.Random, reinforcement: bool) -> Task:
    """A reasoning problem of the half of the train split that serves reinforcement learning, or of the other."""
    while True:
        task = _reasoning(rng, "train")
        if for_reinforcement(task.prompt) == reinforcement:
            return task


def _general(rng: random.Random) -> Task:
    """A task of general reinforcement learning: reasoning, a form, a tool or a mode, in a mode of its own.

    Reasoning is seldom asked without thinking: the answers are guesses then, and rewarded guesses are noise.
    """
    kind = rng.choice(("reasoning", "instructions", "tools", "modes"))
    if kind == "modes":
        return mode_task(rng, _training(rng, reinforcement=True))
    if kind == "reasoning":
        return flagged(_training(rng, reinforcement=True), rng.random() < 0.8, rng)
    make = instruction if kind == "instructions" else tool_task
    return flagged(make(rng, "train"), rng.random() < 0.5, rng)


def _recall(rng: random.Random, num_lines: int) -> Task:
    text, answer = recall_text(rng, num_lines)
    return Task(id=task_id("recall", text), family="recall", prompt=text, answer=answer)


def with_mode(task: Task, thinking: bool) -> Task:
    """The task asked in one mode, without any flag in its text."""
    return msgspec.structs.replace(task, thinking=thinking)
