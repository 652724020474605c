"""Mode switches: placing /think and /no_think in prompts of one or several turns; the last one wins."""

import random

import msgspec

from pensar.tasks.families import FAMILIES
from pensar.tasks.task import Task, task_id
from pensar.text.conversation import Message

_FLAGS = {True: "/think", False: "/no_think"}


def flagged(task: Task, thinking: bool, rng: random.Random) -> Task:
    """The task in the given mode: a flag at the end of the prompt, at times after a contrary one.

    A thinking prompt goes without any flag one time in three, since thinking is the default.
    """
    if thinking and rng.random() < 1 / 3:
        return msgspec.structs.replace(task, thinking=True)
    return _with_flag(task, thinking, rng)


def with_history(task: Task, thinking: bool, rng: random.Random, num_turns: int) -> Task:
    """The task in the given mode after finished turns, each with a flag of its own.

    One time in three the task has no flag, and the last of the earlier turns decides. Earlier assistant turns show
    their answers only, as the chat format leaves them in the history.
    """
    bare = rng.random() < 1 / 3
    modes = [rng.random() < 0.5 for _ in range(num_turns)]
    if bare and modes:
        modes[-1] = thinking
    history: list[Message] = []
    for mode in modes:
        problem = FAMILIES[rng.choice(("chain", "logic"))][0](rng, 1)
        history.append(Message(role="user", content=f"{problem.prompt} {_FLAGS[mode]}"))
        history.append(Message(role="assistant", content=problem.answer))
    asked = msgspec.structs.replace(task, thinking=thinking) if bare else _with_flag(task, thinking, rng)
    return msgspec.structs.replace(asked, history=tuple(history))


def mode_task(rng: random.Random, problem: Task) -> Task:
    """A conversation of one to three turns with flags at random; only the mode of the reply is scored."""
    thinking, num_turns = rng.random() < 0.5, rng.randint(0, 2)
    task = with_history(problem, thinking, rng, num_turns) if num_turns else flagged(problem, thinking, rng)
    key = " ".join([*(message.content for message in task.history), task.prompt])
    return msgspec.structs.replace(
        task, id=task_id("think_follow", key), family="think_follow", verifier="mode"
    )


def _with_flag(task: Task, thinking: bool, rng: random.Random) -> Task:
    flags = _FLAGS[thinking]
    if rng.random() < 0.2:
        flags = f"{_FLAGS[not thinking]} {flags}"
    return msgspec.structs.replace(task, prompt=f"{task.prompt} {flags}", thinking=thinking)
