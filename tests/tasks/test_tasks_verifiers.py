"""Verifiers: the gold reply scores one; nothing, junk, an echo and the gold of another item score zero."""

import random
from collections.abc import Callable
from itertools import pairwise

import msgspec
import pytest

from pensar.tasks.families import FAMILIES, draw
from pensar.tasks.instructions import FORMS, instruction
from pensar.tasks.modes import flagged, mode_task
from pensar.tasks.problems import with_mode
from pensar.tasks.task import Task
from pensar.tasks.tools import LOOKUP, respond, tool_task
from pensar.tasks.verifiers import VERIFIERS, gold, verify
from pensar.text.chat import parse_reply
from pensar.text.conversation import Message, ToolCall

MAKERS: dict[str, Callable[[random.Random], Task]] = {
    **{family: (lambda rng, family=family: draw(family, "train", rng)) for family in FAMILIES},
    "instructions": lambda rng: instruction(rng, "train"),
    "tools": lambda rng: tool_task(rng, "train"),
    "flagged instructions": lambda rng: flagged(instruction(rng, "test"), rng.random() < 0.5, rng),
    "flagged tools": lambda rng: flagged(tool_task(rng, "test"), rng.random() < 0.5, rng),
    "modes": lambda rng: mode_task(rng, draw("chain", "test", rng)),
}
every_kind = pytest.mark.parametrize("kind", MAKERS)


def tasks_of(kind: str, num: int = 40) -> list[Task]:
    return [MAKERS[kind](random.Random(n)) for n in range(num)]


def said(content: str, reasoning: str | None = None) -> Message:
    return Message(role="assistant", content=content, reasoning_content=reasoning)


@every_kind
def test_the_gold_reply_scores_one(kind: str) -> None:
    for task in tasks_of(kind):
        assert verify(task, gold(task)).value == 1.0
        if task.thinking is None:
            for thinking in (True, False):
                asked = with_mode(task, thinking)
                assert verify(asked, gold(asked)).value == 1.0
                assert verify(task, gold(task, thinking=thinking)).value == 1.0


@every_kind
def test_nothing_and_junk_and_an_echo_score_zero_and_never_raise(kind: str) -> None:
    for task in tasks_of(kind):
        reasoning = "thought" if task.thinking else None
        nothing = Message(role="assistant", content=None)  # type: ignore[arg-type]  # as OpenAI's shape may hold it
        worthless = [(), None, (nothing,), (said(""),), (said("   \n", reasoning),), (said("", reasoning),)]
        if task.verifier != "mode":
            words = ["junk", "\x00", "None", task.prompt, f"{task.answer}{task.answer}?", "🙂" * 50]
            worthless += [(said(word, reasoning),) for word in words]
        worthless += [(*gold(task), Message(role="user", content=task.answer))]
        for turns in worthless:
            assert verify(task, turns).value == 0.0, (task, turns)  # type: ignore[arg-type]


@every_kind
def test_the_gold_of_another_item_scores_zero(kind: str) -> None:
    tasks = tasks_of(kind)
    for task, other in pairwise(tasks):
        if task.verifier == "mode":
            unlike = task.thinking != other.thinking
        else:
            unlike = task.answer != other.answer or task.arguments.get("call") != other.arguments.get("call")
        if unlike:
            assert verify(task, gold(other)).value == 0.0, (task, other)


@every_kind
def test_the_wrong_mode_scores_zero_whatever_it_says(kind: str) -> None:
    for task in tasks_of(kind):
        for thinking in (True, False):
            asked = msgspec.structs.replace(task, thinking=thinking)
            contrary = gold(msgspec.structs.replace(task, thinking=not thinking))
            assert verify(asked, contrary) == verify(asked, contrary)
            assert verify(asked, contrary).value == 0.0
            assert verify(asked, contrary).reason == "mode"


def test_blank_reasoning_is_no_thought() -> None:
    task = Task(id="x", family="chain", prompt="1+1", answer="2", thinking=False)
    assert verify(task, (said("2", " \n"),)).value == 1.0
    assert verify(with_mode(task, True), (said("2", " \n"),)).value == 0.0


def test_an_answer_may_have_spaces_around_it_and_nothing_else() -> None:
    task = Task(id="x", family="chain", prompt="1+1", answer="2")
    assert verify(task, (said(" 2\n"),)).value == 1.0
    for wrong in ("2.", "The answer is 2", "22", "two", "2 2"):
        assert verify(task, (said(wrong),)).reason == "wrong answer"


def test_the_tool_must_be_called_once_as_asked_and_only_where_it_is_needed() -> None:
    task = next(task for task in tasks_of("tools") if task.arguments.get("call"))
    words = task.arguments["call"]["arguments"]["words"]
    result = Message(role="tool", content=task.answer)

    def calls(*calls: ToolCall) -> Message:
        return Message(role="assistant", tool_calls=calls)

    right = ToolCall(name="lookup", arguments={"words": words})
    assert verify(task, (calls(right), result, said(task.answer))).value == 1.0
    assert verify(task, (said(task.answer),)).reason == "no call"
    for wrong in (
        ToolCall(name="lookup", arguments={"words": "nobody"}),
        ToolCall(name="find", arguments={"words": words}),
        ToolCall(name="lookup", arguments={"words": words, "more": 1}),
        ToolCall(name="lookup", arguments={}),
    ):
        assert verify(task, (calls(wrong), result, said(task.answer))).reason == "wrong call"
    assert verify(task, (calls(right, right), result, said(task.answer))).reason == "wrong call"
    assert verify(task, (calls(right), result, said("0"))).reason == "wrong answer"
    assert verify(task, (calls(right), result, calls(right))).value == 0.0
    free = next(task for task in tasks_of("tools") if not task.arguments.get("call"))
    assert verify(free, (calls(right), result, said(free.answer))).reason == "needless call"
    plain = Task(id="x", family="chain", prompt="1+1", answer="2")
    assert verify(plain, (Message(role="assistant", content="2", tool_calls=(right,)),)).value == 0.0


def test_the_environment_answers_as_text_whatever_it_is_asked() -> None:
    task = next(task for task in tasks_of("tools") if task.environment)
    (words, code), *_ = task.environment.items()
    assert respond(task, "lookup", {"words": words}) == code
    assert respond(task, "lookup", {"words": "nobody"}).startswith("error")
    for arguments in ({}, {"words": None}, {"words": ["a", {"b": 1}]}, {"other": 1}):
        assert respond(task, "lookup", arguments).startswith("error")
    assert respond(task, "rm", {"words": words}).startswith("error")
    assert LOOKUP["function"]["name"] == "lookup"


def test_replies_read_from_text_are_scored_like_messages() -> None:
    task = Task(id="x", family="chain", prompt="1+1", answer="2", thinking=True)
    assert verify(task, (parse_reply("<think>\n1+1=2\n</think>\n\n2"),)).value == 1.0
    assert verify(task, (parse_reply("2"),)).value == 0.0
    assert verify(with_mode(task, False), (parse_reply("<think>\n\n</think>\n\n2"),)).value == 1.0


def test_every_form_shows_the_answer_once_the_instruction_is_followed() -> None:
    tasks = [task for task in tasks_of("instructions", 300) if task.arguments["form"] in FORMS]
    assert {task.arguments["form"] for task in tasks} == set(FORMS)
    for task in tasks:
        sentence, write = FORMS[task.arguments["form"]]
        bare = task.prompt.removesuffix(f"\n{sentence}")
        assert bare != task.prompt
        assert task.answer == write(task.solution.rpartition("=")[2])


def test_repetitions_say_the_words_as_often_as_asked() -> None:
    found = [task for task in tasks_of("instructions", 200) if task.arguments["form"] == "length"]
    assert found
    for task in found:
        _, first, second, times, _ = task.prompt.split()
        assert first != second
        assert task.answer.split() == [first, second] * int(times)


def test_every_verifier_is_used_by_some_kind_of_task() -> None:
    assert {task.verifier for kind in MAKERS for task in tasks_of(kind, 10)} == set(VERIFIERS)
