"""Problem sets: the same from the same seed, none of the held-out problems in training, and flags that obey."""

import random
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from pensar.base.files import files_under, read_jsonl
from pensar.base.stage import Runtime
from pensar.tasks import modes
from pensar.tasks.families import FAMILIES, draw
from pensar.tasks.instructions import FORMS, NAMES
from pensar.tasks.modes import flagged, mode_task, with_history
from pensar.tasks.problems import ProblemsConfig, held_out, run, statement
from pensar.tasks.task import Task, for_reinforcement, split_of
from pensar.tasks.verifiers import gold, verify
from pensar.text.chat import mode_of

SMALL = ProblemsConfig(cold_start=120, reinforcement=120, general=240, validation=40, evaluation=120)

ONE_STEP = [
    *(f"Last digit, left to right: {a}{sign}{b}" for a in range(10) for sign in "+-*" for b in range(10)),
    *(
        f"True or false, left to right: {a} {word} {b}"
        for a in "TF"
        for word in ("and", "or", "xor")
        for b in "TF"
    ),
]
FORM_PROMPTS = {
    *(f"{problem}\n{sentence}" for problem in ONE_STEP for sentence, _ in FORMS.values()),
    *(f"Write {a} {b} {times} times" for a, b in permutations(NAMES, 2) for times in (2, 3, 4)),
}
"""Every request for a form that there is."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    run(SMALL, {}, folder, Runtime(logs=folder.with_name("logs")))
    return folder


def read(folder: Path, name: str) -> list[Task]:
    return list(read_jsonl(folder / f"{name}.jsonl", Task))


def test_sets_have_the_asked_sizes_and_the_counts_say_so(sets: Path, tmp_path: Path) -> None:
    counts = run(SMALL, {}, tmp_path, Runtime(logs=tmp_path / "logs"))
    assert counts["train_cold_start"] == 120
    assert counts["evaluation_recall"] == 120
    for name, number in counts.items():
        split, _, kind = name.partition("_")
        assert len(read(sets, f"{split}/{kind}")) == number


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(sets: Path, tmp_path: Path) -> None:
    run(SMALL, {}, tmp_path / "again", Runtime(logs=tmp_path / "logs"))
    first = {name: path.read_bytes() for name, path in files_under(sets).items()}
    again = {name: path.read_bytes() for name, path in files_under(tmp_path / "again").items()}
    assert first == again
    run(
        ProblemsConfig(seed=2, cold_start=20, reinforcement=0, general=0, validation=0, evaluation=0),
        {},
        tmp_path / "other",
        Runtime(logs=tmp_path / "logs"),
    )
    assert read(tmp_path / "other", "train/cold_start") != read(sets, "train/cold_start")[:20]


def test_general_reasoning_is_mostly_asked_with_thinking(sets: Path) -> None:
    asked = [task for task in read(sets, "train/general") if task.family in ("chain", "logic", "parity")]
    assert 0.65 < sum(bool(task.thinking) for task in asked) / len(asked) < 0.95


def test_ids_are_unique_over_all_sets(sets: Path) -> None:
    ids = [task.id for path in files_under(sets).values() for task in read_jsonl(path, Task)]
    assert len(ids) == len(set(ids))


def test_no_held_out_problem_is_trained_on_in_any_mode_or_with_any_tool(sets: Path) -> None:
    def problems(split: str) -> set[tuple[str, str]]:
        """Prompt without flags, answer: the prompt alone would not tell two codes of one name apart."""
        found = [task for path in (sets / split).glob("*.jsonl") for task in read_jsonl(path, Task)]
        return {(re.split(r" /(?:no_)?think", task.prompt)[0], task.answer) for task in found}

    train = problems("train")
    assert len(train) > 400
    assert not train & problems("evaluation")
    assert not train & problems("validation")
    assert not problems("validation") & problems("evaluation")
    held = held_out(sets)
    assert not held & {
        statement(task) for name in ("cold_start", "general") for task in read(sets, f"train/{name}")
    }
    reasoning = {task.prompt for task in read(sets, "evaluation/reasoning")}
    assert not reasoning & {prompt for prompt, _ in train}


def test_a_family_that_has_no_more_to_give_leaves_a_smaller_set(tmp_path: Path) -> None:
    config = ProblemsConfig(cold_start=0, reinforcement=0, general=60, validation=0, evaluation=3200)
    counts = run(config, {}, tmp_path, Runtime(logs=tmp_path / "logs"))
    there_are = sum(split_of(prompt) == "test" for prompt in FORM_PROMPTS)
    assert len(FORM_PROMPTS) == 312 * 6 + 16 * 15 * 3
    assert 0.9 * there_are < counts["evaluation_instructions"] <= there_are < 0.15 * len(FORM_PROMPTS)
    assert {task.prompt for task in read(tmp_path, "evaluation/instructions")} <= FORM_PROMPTS
    assert counts["train_general"] > 50


def test_no_pair_of_words_is_looked_up_in_training_and_evaluation(tmp_path: Path) -> None:
    config = ProblemsConfig(cold_start=0, reinforcement=0, general=600, validation=0, evaluation=200)
    run(config, {}, tmp_path, Runtime(logs=tmp_path / "logs"))

    def looked_up(name: str) -> set[str]:
        return {
            task.arguments["call"]["arguments"]["words"] for task in read(tmp_path, name) if task.environment
        }

    evaluated, trained = looked_up("evaluation/tools"), looked_up("train/general")
    assert len(evaluated) > 15
    assert len(trained) > 80
    assert not evaluated & trained


def test_queries_of_reinforcement_are_none_that_the_cold_start_has_and_of_every_family(sets: Path) -> None:
    for name, reinforcement in (("cold_start", False), ("reinforcement", True)):
        tasks = read(sets, f"train/{name}")
        assert all(for_reinforcement(task.prompt) == reinforcement for task in tasks)
        assert min(Counter(task.family for task in tasks).values()) > 0.2 * len(tasks)
    general = [task for task in read(sets, "train/general") if task.verifier == "exact" and not task.history]
    bare = {re.split(r" /(?:no_)?think", task.prompt)[0] for task in general if task.family in FAMILIES}
    assert len(bare) > 30
    assert all(map(for_reinforcement, bare))


def test_every_problem_of_every_set_can_be_solved(sets: Path) -> None:
    for name, path in files_under(sets).items():
        if name == "evaluation/recall.jsonl":
            continue
        for task in read_jsonl(path, Task):
            assert verify(task, gold(task)).value == 1.0


def test_recall_asks_for_a_code_that_stands_in_the_text(sets: Path) -> None:
    for task in read(sets, "evaluation/recall"):
        *lines, asked = task.prompt.splitlines()
        planted = [line for line in lines if line.startswith(asked)]
        assert [line.removesuffix(".") for line in planted] == [f"{asked}{task.answer}"]


# ---------------------------------------------------------------- flags


def test_the_last_flag_wins_in_every_mode_task() -> None:
    """`mode_of` reads the conversation as the chat format does, without knowing what was meant."""
    seen: set[tuple[int, bool, bool]] = set()
    for number in range(300):
        task = mode_task(random.Random(number), draw("logic", "test", random.Random(number)))
        found = mode_of(task.conversation())
        assert task.thinking == (True if found is None else found), task
        seen.add((len(task.history) // 2, bool(task.thinking), found is None))
    assert {turns for turns, _, _ in seen} == {0, 1, 2}
    assert {thinking for _, thinking, _ in seen} == {True, False}
    assert {silent for _, _, silent in seen} == {True, False}


def test_contrary_flags_in_one_prompt_occur_and_the_later_one_counts() -> None:
    task = draw("chain", "train", random.Random(0))
    prompts = {
        thinking: {flagged(task, thinking, random.Random(n)).prompt for n in range(60)}
        for thinking in (True, False)
    }
    bare = task.prompt
    assert prompts[True] == {bare, f"{bare} /think", f"{bare} /no_think /think"}
    assert prompts[False] == {f"{bare} /no_think", f"{bare} /think /no_think"}


def test_after_earlier_turns_the_last_flag_counts_also_where_the_prompt_has_none() -> None:
    task = draw("chain", "train", random.Random(0))
    seen = set()
    for number in range(80):
        thinking = number % 2 == 0
        asked = with_history(task, thinking, random.Random(number), 2)
        assert asked.thinking == thinking == mode_of(asked.conversation())
        assert [message.role for message in asked.history] == ["user", "assistant"] * 2
        seen.add((thinking, asked.prompt == task.prompt))
    assert seen == {(True, True), (True, False), (False, True), (False, False)}


def test_earlier_turns_are_answered_rightly() -> None:
    task = draw("logic", "train", random.Random(0))
    for number in range(30):
        asked = modes.with_history(task, True, random.Random(number), 1)
        question, answer = asked.history
        shown = question.content.split(" /")[0].rpartition(": ")[2]
        if shown[0].isdigit():
            assert answer.content == str(eval(shown) % 10)
        else:
            first, word, second = shown.split()
            truth = {
                "and": "T" if first == second == "T" else "F",
                "or": "T" if "T" in (first, second) else "F",
            }
            assert answer.content == (truth | {"xor": "T" if first != second else "F"})[word]
