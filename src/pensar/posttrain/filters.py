"""The six response filters of the long-CoT cold start (Qwen3 report, section 4.1), and its query filters."""

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from pensar.base.config import Config
from pensar.tasks.task import Task
from pensar.tasks.verifiers import verify
from pensar.text.conversation import Message

SHORTEST_THOUGHT, LONGEST_THOUGHT = 9, 2_048
"""Characters of a block whose repetition counts in full, from and to."""
STEPS_OF_A_THOUGHT = 8
"""Copies of a shorter block that count as one."""
SEPARATOR = 2
"""Characters, such as a full stop and a space, that may be missing after the last copy."""


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
    """How often the most repeated thought stands in a row; 1 where none does.

    A thought is a block of 9 to 2,048 characters that is not itself a repetition; the last copy may lack its separator.
    Shorter blocks are steps, which honest reasoning does again: eight of them count as one thought, and those without
    a letter or digit, such as ruled lines, not at all.
    """
    letters = np.frombuffer(reasoning.encode("utf-32-le", "surrogatepass"), np.uint32)
    most = 1
    for length in range(1, min(LONGEST_THOUGHT, (len(letters) + SEPARATOR) // 2) + 1):
        differ = np.flatnonzero(letters[length:] != letters[:-length])
        edges = np.concatenate(([-1], differ, [len(letters) - length]))
        matched = np.diff(edges) - 1
        matched[-1] += SEPARATOR if length >= SHORTEST_THOUGHT else 0
        copies = 1 + matched // length
        thoughts = copies if length >= SHORTEST_THOUGHT else copies // STEPS_OF_A_THOUGHT
        for run in np.flatnonzero(thoughts > most):
            block = reasoning[edges[run] + 1 : edges[run] + 1 + length]
            if thoughts[run] > most and _is_thought(block):
                most = int(thoughts[run])
    return most


def _is_thought(block: str) -> bool:
    """Whether a block says something, and says it once."""
    once = block not in (block + block)[1:-1]
    return once and (len(block) >= SHORTEST_THOUGHT or any(letter.isalnum() for letter in block))


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
