"""Tasks that ask for a form: a known answer to be written in brackets, as JSON, twice, a given number of times."""

import random
from collections.abc import Callable

import msgspec

from pensar.tasks.families import FAMILIES
from pensar.tasks.task import Split, Task, split_of, task_id

NAMES = tuple(
    "amber birch cedar delta ember flint grove harbor ivory jade lotus maple ocean pearl river stone".split()
)
"""Words that stand for themselves, in tasks that copy them."""

FORMS: dict[str, tuple[str, Callable[[str], str]]] = {
    "brackets": ("Answer in brackets.", lambda answer: f"[{answer}]"),
    "json": ("Answer as JSON.", lambda answer: f'{{"answer": "{answer}"}}'),
    "twice": ("Give the answer twice.", lambda answer: f"{answer} {answer}"),
    "sentence": ("Answer in a sentence.", lambda answer: f"The answer is {answer}."),
    "stars": ("Put the answer between stars.", lambda answer: f"*{answer}*"),
    "heading": ("Answer as a heading.", lambda answer: f"# {answer}"),
}
"""Form -> the instruction and what the answer looks like when it is followed."""


def instruction(rng: random.Random, split: Split) -> Task:
    """A one-step problem whose answer is asked in a certain form, or two words to be written a number of times.

    The split holds for problem and form together: each form is known from training, and so is each one-step fact.
    """
    while True:
        task = _repetition(rng) if rng.random() < 0.25 else _in_form(rng)
        if split_of(task.prompt) == split:
            return task


def _in_form(rng: random.Random) -> Task:
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
    words, times = " ".join(rng.sample(NAMES, 2)), rng.randint(2, 4)
    prompt = f"Write {words} {times} times"
    return Task(
        id=task_id("instructions", prompt),
        family="instructions",
        prompt=prompt,
        answer=" ".join([words] * times),
        solution=f"{times} times {words}",
        arguments={"form": "length"},
    )
