"""Problem sets small enough for the taught model."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from pensar.base.files import write_jsonl
from pensar.base.stage import Runtime
from pensar.tasks.task import Task, task_id


@pytest.fixture(scope="session")
def sets(make_sets: Callable[..., Path]) -> Path:
    return make_sets(cold_start=60, reinforcement=16, general=16, validation=6, evaluation=6, recall_lines=2)


@pytest.fixture
def guesses(tmp_path: Path) -> Path:
    """Queries of which the taught model answers about half rightly."""
    tasks = []
    for first, word, second in product((True, False), ("and", "or", "xor"), (True, False)):
        shown = [("F", "T")[value] for value in (first, second)]
        prompt = f"True or false, left to right: {shown[0]} {word} {shown[1]}"
        truth = {"and": first and second, "or": first or second, "xor": first != second}[word]
        answer = ("F", "T")[truth]
        solution = f"{shown[0]} {word} {shown[1]}={answer}"
        identity = task_id("logic", prompt)
        tasks.append(Task(id=identity, family="logic", prompt=prompt, answer=answer, solution=solution))
    folder = tmp_path / "guesses"
    for name in ("train/reinforcement", "train/cold_start", "validation/reasoning"):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, tasks if name.startswith("train") else [])
    return folder


@pytest.fixture
def runtime(tmp_path: Path) -> Callable[[str], Runtime]:
    return lambda name: Runtime(logs=tmp_path / f"{name}-logs")
