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
    flags = _FLAGS[thinking]
    if rng.random() < 0.2:
        flags = f"{_FLAGS[not thinking]} {flags}"
    return msgspec.structs.replace(task, prompt=f"{task.prompt} {flags}", thinking=thinking)


def with_history(task: Task, rng: random.Random, num_turns: int) -> Task:
    """The task after finished turns, each with a flag of its own; a task without a flag keeps the last of them.

    Earlier assistant turns show their answers only, as the chat format leaves them in the history.
    """
    history: list[Message] = []
    last = True
    for _ in range(num_turns):
        family = rng.choice(("chain", "logic"))
        problem = FAMILIES[family][0](rng, 1)
        last = rng.random() < 0.5
        history.append(Message(role="user", content=f"{problem.prompt} {_FLAGS[last]}"))
        history.append(Message(role="assistant", content=problem.answer))
    has_flag = "/think" in task.prompt or "/no_think" in task.prompt
    thinking = task.thinking if has_flag else last
    return msgspec.structs.replace(task, history=tuple(history), thinking=thinking)


def mode_task(rng: random.Random, problem: Task) -> Task:
    """A conversation of one to three turns with flags at random; only the mode of the reply is scored."""
    task = flagged(problem, rng.random() < 0.5, rng)
    task = with_history(task, rng, rng.randint(0, 2))
    key = " ".join([*(message.content for message in task.history), task.prompt])
    return msgspec.structs.replace(
        task, id=task_id("think_follow", key), family="think_follow", verifier="mode"
    )
