"""Tasks with a tool: a code that only the tool knows, and questions beside it that need no tool."""

import random
from typing import Any

import msgspec

from pensar.tasks.instructions import NAMES, instruction
from pensar.tasks.task import Task, task_id

LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Find the code of a word",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


def tool_task(rng: random.Random) -> Task:
    """Three in four need one call of the tool; the fourth must be answered without it."""
    if rng.random() < 0.25:
        request = instruction(rng)
        return msgspec.structs.replace(
            request,
            id=task_id("tools", request.prompt),
            family="tools",
            tools=(LOOKUP,),
            verifier="tool",
        )
    name, code = rng.choice(NAMES), str(rng.randrange(10, 100))
    prompt = f"What is the code of {name}?"
    return Task(
        id=task_id("tools", f"{prompt} {code}"),
        family="tools",
        prompt=prompt,
        answer=code,
        solution=f"lookup {name}",
        verifier="tool",
        arguments={"call": {"name": "lookup", "arguments": {"word": name}}},
        tools=(LOOKUP,),
        environment={name: code},
    )


def respond(task: Task, name: str, arguments: dict[str, Any]) -> str:
    """What the environment answers to a call: the value, or an error as text, as a real tool would."""
    if name != "lookup":
        return f"error: there is no tool {name}"
    return task.environment.get(str(arguments.get("word")), "error: unknown word")
