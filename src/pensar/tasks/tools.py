"""Tasks with a tool: the code of a pair of words that only the tool knows, and questions that need no tool."""

import random
from typing import Any

import msgspec

from pensar.tasks.instructions import NAMES, instruction
from pensar.tasks.task import Split, Task, split_of, task_id

LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Find the code of two words",
        "parameters": {"type": "object", "properties": {"words": {"type": "string"}}, "required": ["words"]},
    },
}


def tool_task(rng: random.Random, split: Split) -> Task:
    """Three in four need one call of the tool; the fourth must be answered without it.

    The split holds for the pair of words that is looked up.
    """
    if rng.random() < 0.25:
        request = instruction(rng, split)
        return msgspec.structs.replace(
            request,
            id=task_id("tools", request.prompt),
            family="tools",
            tools=(LOOKUP,),
            verifier="tool",
        )
    while True:
        task = _lookup(rng)
        if split_of(task.prompt) == split:
            return task


def _lookup(rng: random.Random) -> Task:
    words, code = " ".join(rng.sample(NAMES, 2)), str(rng.randrange(10, 100))
    prompt = f"What is the code of {words}?"
    return Task(
        id=task_id("tools", f"{prompt} {code}"),
        family="tools",
        prompt=prompt,
        answer=code,
        solution=f"lookup {words}",
        verifier="tool",
        arguments={"call": {"name": "lookup", "arguments": {"words": words}}},
        tools=(LOOKUP,),
        environment={words: code},
    )


def respond(task: Task, name: str, arguments: dict[str, Any]) -> str:
    """What the environment answers to a call: the value, or an error as text, as a real tool would."""
    if name != "lookup":
        return f"error: there is no tool {name}"
    return task.environment.get(str(arguments.get("words")), "error: unknown words")
