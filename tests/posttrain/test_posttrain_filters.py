"""The six response filters, each on a case made for it and on a clean one."""

import random

import pytest

from pensar.posttrain.coldstart import WorkedTeacher, candidate
from pensar.posttrain.filters import (
    ResponseFilters,
    conclusion,
    leaked,
    objection,
    repeats,
    scripts,
    several_questions,
    shingles,
    steps_of,
)
from pensar.tasks.families import FAMILIES
from pensar.tasks.task import Task
from pensar.text.conversation import Message

TASK = Task(
    id="x", family="chain", prompt="Last digit, left to right: 3+4*5-6", answer="9", solution="3+4=7*5=5-6=9"
)
FILTERS = ResponseFilters()


def judged(reasoning: str, content: str = "9", *, validation: str = "Arrows 1>2. From 1 go 1") -> str | None:
    reply = Message(role="assistant", reasoning_content=reasoning, content=content)
    return objection(TASK, reply, FILTERS, [shingles(validation)])


def test_a_clean_reply_passes() -> None:
    assert judged(TASK.solution) is None


@pytest.mark.parametrize(
    ("reasoning", "content", "reason"),
    [
        ("3+4=7*5=5-6=8", "8", "wrong answer"),
        ("3+4=7*5=5-6=9 " * 5, "9", "repetition"),
        ("it must be nine", "9", "guesswork"),
        ("3+4=7*5=5-6=8", "9", "thinking and answer disagree"),
        ("3+4=7*5=5-6 это =9", "9", "mixed scripts"),
    ],
)
def test_each_fault_is_named(reasoning: str, content: str, reason: str) -> None:
    assert judged(reasoning, content) == reason


def test_a_problem_like_one_for_validation_is_dropped() -> None:
    assert judged(TASK.solution, validation=TASK.prompt) == "similar to validation"
    assert judged(TASK.solution, validation=TASK.prompt[1:]) == "similar to validation"
    assert judged(TASK.solution, validation=TASK.prompt[:-4] + "8*1+2") is None


def test_thresholds_are_those_of_the_configuration() -> None:
    reply = Message(role="assistant", reasoning_content=TASK.solution, content="9")
    assert objection(TASK, reply, ResponseFilters(min_steps=3), []) is None
    assert objection(TASK, reply, ResponseFilters(min_steps=4), []) == "guesswork"
    twice = Message(role="assistant", reasoning_content=f"{TASK.solution} {TASK.solution} ", content="9")
    assert objection(TASK, twice, FILTERS, []) is None
    assert objection(TASK, twice, ResponseFilters(max_repeats=1), []) == "repetition"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_steps_and_the_conclusion_are_read_from_worked_solutions(family: str) -> None:
    for number in range(30):
        task = FAMILIES[family][0](random.Random(number), 1 + number % 6)
        assert len(steps_of(task.solution)) == task.difficulty
        assert conclusion(task.solution) == task.answer
    assert steps_of("") == []
    assert conclusion("no step at all") == ""


FAULTS = {
    "wrong": "wrong answer",
    "repeat": "repetition",
    "guess": "guesswork",
    "disagree": "thinking and answer disagree",
    "mixed": "mixed scripts",
    "hasty": None,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_fault_of_the_worked_teacher_meets_its_filter(family: str, fault: str) -> None:
    always = WorkedTeacher(**(dict.fromkeys(FAULTS, 0.0) | {fault: 1.0}))
    for number in range(40):
        # Of three steps at least: five times two arrows are shorter than what counts as a repetition.
        task = FAMILIES[family][0](random.Random(number), 3 + number % 2)
        reply = candidate(task, always, random.Random(number))
        assert objection(task, reply, FILTERS, []) == FAULTS[fault], (task, reply)


def test_a_teacher_without_faults_gives_the_worked_solution() -> None:
    none = WorkedTeacher(**dict.fromkeys(FAULTS, 0.0))
    reply = candidate(TASK, none, random.Random(0))
    assert (reply.reasoning_content, reply.content) == (TASK.solution, TASK.answer)


def test_faults_come_in_their_shares() -> None:
    shares = WorkedTeacher(hasty=0.0, wrong=0.3, guess=0.2, repeat=0.0, disagree=0.1, mixed=0.0)
    replies = [candidate(TASK, shares, random.Random(n)) for n in range(2000)]
    reasons = [objection(TASK, reply, FILTERS, []) for reply in replies]
    assert reasons.count("wrong answer") / 2000 == pytest.approx(0.3, abs=0.04)
    assert reasons.count("guesswork") / 2000 == pytest.approx(0.2, abs=0.04)
    assert reasons.count("thinking and answer disagree") / 2000 == pytest.approx(0.1, abs=0.03)
    assert reasons.count(None) / 2000 == pytest.approx(0.4, abs=0.04)


def test_repeated_thoughts_are_counted_wherever_they_stand() -> None:
    assert repeats("abcdefghijkl" * 3) == 3
    assert repeats("a lead that differs, abcdefghijklabcdefghijkl, and an end") == 2
    assert repeats("short") == repeats("") == 1
    # A longer run of equal characters, `-` 40 times, does not hide the shorter one beside it.
    assert repeats("-" * 40 + "abcdefghijkl" * 4) == 4
    long = "".join(random.Random(1).choices("abcdefgh ", k=1500))
    assert repeats(f"{long}. {long}. {long}. {long}") == 4  # the last without its full stop
    assert repeats(f"{long}. {long}. {long[:-2]}x") == 2


def test_steps_count_an_eighth_of_a_thought_and_ruled_lines_nothing() -> None:
    assert repeats("ab" * 15) == 1
    assert repeats("ab" * 16) == 2
    assert repeats("no " * 32) == 4
    assert repeats("=" * 400) == repeats("-+" * 200) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_no_honest_solution_repeats_and_every_copied_one_does(family: str) -> None:
    generate, low, high = FAMILIES[family]
    for number in range(400):
        solution = generate(random.Random(number), low + number % (high - low + 1)).solution
        assert repeats(solution) <= FILTERS.max_repeats, solution
        if len(solution) >= 9:
            assert repeats(f"{solution} " * 5) >= 5, solution


def test_scripts_by_hand() -> None:
    assert scripts("a1! ß") == {"LATIN"}
    assert scripts("日x") == {"CJK", "LATIN"}
    assert shingles("abcdef") == {"abcde", "bcdef"}
    assert shingles("abc") == {"abc"}
    assert leaked("abcdef", [shingles("abcdefg")], 2 / 3)
    assert not leaked("abcdef", [shingles("abcdefg")], 0.7)
    assert not leaked("abcdef", [], 0.1)
    assert several_questions("What is 1? And 2?")
    assert not several_questions("What is 1?")
