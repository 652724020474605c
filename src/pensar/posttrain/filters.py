"""The six response filters of the long-CoT cold start (Qwen3 report, section 4.1), and its query filters."""

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from pensar.base.config import Config
from pensar.tasks.task import Task
from pensar.tasks.verifiers import verify
from pensar.text.conversation import Message


class ResponseFilters(Config, frozen=True, kw_only=True):
    """Thresholds of the filters; a candidate is dropped by the first that objects."""

    max_repeats: int = 3
    """The same thought may stand this often in a row."""
    min_steps: int = 1
    """Steps of reasoning below which a right answer counts as guesswork. A strict value asks for every step."""
    similarity: float = 0.9
    """Jaccard similarity of character 5-grams with a validation problem from which a query counts as leaked."""


def objection(
    task: Task, reply: Message, config: ResponseFilters, validation: Sequence[frozenset[str]]
) -> str | None:
    """The name of the first filter that drops the reply, or None."""
    reasoning = reply.reasoning_content or ""
    checks: tuple[tuple[str, Callable[[], bool]], ...] = (
        ("wrong answer", lambda: verify(task, (reply,)).value < 1),
        ("repetition", lambda: repeats(reasoning) > config.max_repeats),
        ("guesswork", lambda: len(steps_of(reasoning)) < config.min_steps),
        ("thinking and answer disagree", lambda: conclusion(reasoning) != reply.content.strip()),
        ("mixed scripts", lambda: not scripts(reasoning + reply.content) <= scripts(task.prompt)),
        ("similar to validation", lambda: leaked(task.prompt, validation, config.similarity)),
    )
    return next((name for name, found in checks if found()), None)


def steps_of(reasoning: str) -> list[str]:
    """The results that the reasoning arrives at one after another: what follows each `=` or `>`."""
    return re.findall(r"[=>]\s*([^\s=>]+?)(?=[=>,.\s+*-]|$)", reasoning)


def repeats(reasoning: str) -> int:
    """How often the most repeated block of 9 to 512 characters stands in a row; 1 where none does.

    A block that is itself a repetition does not count: `0=even,0=even,` is a step done twice, not a thought.
    """
    letters = np.frombuffer(reasoning.encode("utf-32-le", "surrogatepass"), np.uint32)
    most = 1
    for length in range(9, min(512, len(letters) // 2) + 1):
        differ = np.flatnonzero(letters[length:] != letters[:-length])
        edges = np.concatenate(([-1], differ, [len(letters) - length]))
        start = int(np.argmax(np.diff(edges)))
        copies = 1 + int(edges[start + 1] - edges[start] - 1) // length
        if copies > most:
            block = reasoning[edges[start] + 1 : edges[start] + 1 + length]
            if block not in (block + block)[1:-1]:
                most = copies
    return most


def conclusion(reasoning: str) -> str:
    """The last result in the reasoning."""
    steps = steps_of(reasoning)
    return steps[-1] if steps else ""


def scripts(text: str) -> set[str]:
    """First words of the Unicode names of its letters, such as LATIN or CYRILLIC."""
    return {unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()} | {"LATIN"}


def shingles(text: str) -> frozenset[str]:
    """Character 5-grams."""
    return frozenset(text[start : start + 5] for start in range(max(1, len(text) - 4)))


def leaked(prompt: str, validation: Sequence[frozenset[str]], threshold: float) -> bool:
    """Whether the prompt is close to a validation problem."""
    own = shingles(prompt)
    return any(len(own & other) / len(own | other) >= threshold for other in validation)


def several_questions(prompt: str) -> bool:
    """Queries of several sub-questions have no single answer to verify."""
    return prompt.count("?") > 1
