"""Task: one verifiable problem, the noun shared by pre-training text, reinforcement learning and evaluation."""

import hashlib
from typing import Any, Literal

import msgspec

from pensar.text.conversation import Conversation, Message

Split = Literal["train", "validation", "test"]


class Task(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A prompt, its reference answer and the name of the verifier that compares a reply with it."""

    id: str
    family: str
    prompt: str
    answer: str
    solution: str = ""
    """Worked reasoning that leads to the answer; empty where none is needed."""
    difficulty: int = 1
    """Number of steps that the solution takes."""
    verifier: str = "exact"
    arguments: dict[str, Any] = {}
    """What the verifier needs beside the answer, such as the asked form."""
    tools: tuple[dict[str, Any], ...] = ()
    environment: dict[str, str] = {}
    """What the task's tool knows: key -> value."""

    history: tuple[Message, ...] = ()
    """Turns before the prompt."""
    thinking: bool | None = None
    """The mode that the reply must be in; None where either will do."""

    def conversation(self) -> Conversation:
        """What is put to the model."""
        messages = (*self.history, Message(role="user", content=self.prompt))
        return Conversation(messages=messages, tools=self.tools)


def task_id(family: str, text: str) -> str:
    """Stable name of a problem: its family and a hash of its text."""
    return f"{family}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def split_of(prompt: str) -> Split:
    """The split a problem belongs to: a function of its text, so no problem is ever in two of them."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0]
    if bucket < 26:
        return "test"
    return "validation" if bucket < 39 else "train"


def for_reinforcement(prompt: str) -> bool:
    """Whether a problem of the train split is kept for reinforcement learning: half of them, by their text.

    Queries of reinforcement learning are none that the cold start has used (report, section 4.2).
    """
    return hashlib.sha256(prompt.encode()).digest()[1] % 2 == 1
