"""Tasks that ask for a form: a known answer to be written in brackets, as JSON, twice, a given number of times."""

import random
from collections.abc import Callable

import msgspec

from pensar.tasks.families import FAMILIES
from pensar.tasks.task import Task, task_id

FORMS: dict[str, tuple[str, Callable[[str], str]]] = {
    "brackets": ("Answer in brackets.", lambda answer: f"[{answer}]"),
    "json": ("Answer as JSON.", lambda answer: f'{{"answer": "{answer}"}}'),
    "twice": ("Give the answer twice.", lambda answer: f"{answer} {answer}"),
    "sentence": ("Answer in a sentence.", lambda answer: f"The answer is {answer}."),
    "stars": ("Put the answer between stars.", lambda answer: f"*{answer}*"),
    "heading": ("Answer as a heading.", lambda answer: f"# {answer}"),
}
"""Form -> the instruction and what the answer looks like when it is followed."""

_WORDS = ("amber", "cedar", "delta", "ember", "flint", "grove", "harbor", "ivory", "jade", "lotus")


def instruction(rng: random.Random) -> Task:
    """A one-step problem whose answer is asked in a certain form, or a word to be written a number of times."""
    if rng.random() < 0.25:
        return _repetition(rng)
    family = rng.choice(("chain", "logic"))
    problem = FAMILIES[family][0](rng, 1)
    form = rng.choice(tuple(FORMS))
    sentence, write = FORMS[form]
    prompt = f"{problem.prompt}\n{sentence}"
    return msgspec.structs.replace(
        problem,
        id=task_id("instructions", prompt),
        family="instructions",
        prompt=prompt,
        answer=write(problem.answer),
        arguments={"form": form},
    )


def _repetition(rng: random.Random) -> Task:
    word, times = rng.choice(_WORDS), rng.randint(2, 6)
    prompt = f"Write {word} {times} times"
    return Task(
        id=task_id("instructions", prompt),
        family="instructions",
        prompt=prompt,
        answer=" ".join([word] * times),
        solution=f"{times} times {word}",
        arguments={"form": "length"},
    )
