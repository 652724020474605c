"""Verifiers: functions from a task and the turns of a reply to a score, each with the reply that scores one."""

from collections.abc import Callable, Sequence

import msgspec

from pensar.tasks.task import Task
from pensar.tasks.tools import respond
from pensar.text.conversation import Message, ToolCall


class Score(msgspec.Struct, frozen=True):
    """One for a right reply, zero for a wrong one; `reason` says what was wrong."""

    value: float
    reason: str = ""


Turns = Sequence[Message]
"""What came after the prompt: assistant turns and the tool's answers between them."""
Verifier = Callable[[Task, Turns], Score]


def verify(task: Task, turns: Turns) -> Score:
    """The score of a reply; a reply in the wrong mode scores zero whatever it says."""
    if not turns or turns[-1].role != "assistant":
        return Score(0.0, "no answer")
    if task.thinking is not None and has_thought(turns) != task.thinking:
        return Score(0.0, "mode")
    return VERIFIERS[task.verifier](task, turns)


def has_thought(turns: Turns) -> bool:
    """Whether any assistant turn holds reasoning."""
    return any(turn.reasoning_content and turn.reasoning_content.strip() for turn in turns)


def exact(task: Task, turns: Turns) -> Score:
    """The answer is the reference, but for spaces around it, and no tool was called."""
    reply = turns[-1]
    if reply.tool_calls:
        return Score(0.0, "called a tool")
    return Score(1.0) if _said(reply) == task.answer else Score(0.0, "wrong answer")


def mode(task: Task, turns: Turns) -> Score:
    """The mode alone counts: `verify` has compared it before; what is left is that an answer was given."""
    return Score(1.0) if _said(turns[-1]) else Score(0.0, "empty answer")


def tool(task: Task, turns: Turns) -> Score:
    """The expected call was made, once, with the expected arguments, and the final answer is the reference."""
    calls = [call for turn in turns for call in turn.tool_calls]
    expected = task.arguments.get("call")
    if expected is None:
        return Score(0.0, "needless call") if calls else exact(task, turns)
    if [(call.name, call.arguments) for call in calls] != [(expected["name"], expected["arguments"])]:
        return Score(0.0, "wrong call" if calls else "no call")
    return exact(task, turns[-1:])


VERIFIERS: dict[str, Verifier] = {"exact": exact, "mode": mode, "tool": tool}


def gold(task: Task, *, thinking: bool | None = None) -> tuple[Message, ...]:
    """The turns of a perfect reply, in the task's mode or, where it has none, in the given one."""
    wanted = task.thinking if task.thinking is not None else thinking
    reasoning = (task.solution or task.answer) if wanted else None
    answer = Message(role="assistant", content=task.answer, reasoning_content=reasoning)
    expected = task.arguments.get("call")
    if expected is None:
        return (answer,)
    call = ToolCall(name=expected["name"], arguments=expected["arguments"])
    result = respond(task, call.name, call.arguments)
    final = f"code {result}" if wanted else None
    return (
        Message(role="assistant", reasoning_content=reasoning, tool_calls=(call,)),
        Message(role="tool", content=result),
        Message(role="assistant", content=task.answer, reasoning_content=final),
    )


def _said(reply: Message) -> str:
    """The content without spaces around it; messages from outside may hold null beside tool calls."""
    return (reply.content or "").strip()
