"""Problems as plain documents for pre-training: facts in direct form, worked solutions, and planted codes to recall."""

import random
from collections.abc import Iterator

from pensar.base.files import seed_of
from pensar.tasks.families import FAMILIES, draw
from pensar.tasks.instructions import NAMES
from pensar.tasks.task import split_of

_CODES = "abcdefghijklmnop"
DOMAINS = ("tables", "facts", "worked", "recall", "long-recall")


def pretraining_texts(num: int, seed: int) -> Iterator[tuple[str, str]]:
    """`num` documents of every domain as (id, text); the id begins with the domain.

    Only problems of the train split are used, besides the one-step facts that every split rests on.
    """
    writers = {
        "tables": _tables,
        "facts": _facts,
        "worked": _worked,
        "recall": _recall,
        "long-recall": _long_recall,
    }
    for domain in DOMAINS:
        for index in range(num):
            rng = random.Random(seed_of(seed, domain, index))
            yield f"{domain}-{index:06d}", writers[domain](rng)


def recall_text(rng: random.Random, num_lines: int) -> tuple[str, str]:
    """A long text in which codes are planted among worked problems, and the code asked for at its end.

    Returns the text up to the answer, and the answer.
    """
    lines, codes = _planted(rng, num_lines)
    asked = rng.choice(sorted(codes))
    return "\n".join([*lines, asked]), f"={codes[asked]}"


def _planted(rng: random.Random, num_lines: int) -> tuple[list[str], dict[str, str]]:
    """Worked problems with four names and their codes in the first half of them."""
    names = rng.sample(NAMES, 4)
    codes = {name: rng.choice(_CODES) for name in names}
    lines = [_worked_line(rng) for _ in range(num_lines)]
    for name in names:
        lines.insert(rng.randrange(len(lines) // 2 + 1), f"{name}={codes[name]}")
    return lines, codes


def _tables(rng: random.Random) -> str:
    """One-step facts in their shortest form, such as `7+4=1`, a line each."""
    return "\n".join(
        FAMILIES[rng.choice(("chain", "chain", "chain", "logic"))][0](rng, 1).solution for _ in range(40)
    )


def _facts(rng: random.Random) -> str:
    """Direct answers to problems of one to three steps, one a line; one-step problems are the commonest."""
    lines = []
    for _ in range(10):
        family = rng.choice(("chain", "chain", "logic", "parity"))
        steps = rng.choice((1, 1, 1, 2, 3))
        while True:
            task = FAMILIES[family][0](rng, steps)
            if steps == 1 or split_of(task.prompt) == "train":
                break
        lines.append(f"{task.prompt}\n{task.answer}")
    return "\n\n".join(lines)


def _worked(rng: random.Random) -> str:
    return "\n\n".join(_worked_line(rng) for _ in range(5))


def _worked_line(rng: random.Random) -> str:
    task = draw(rng.choice(tuple(FAMILIES)), "train", rng)
    return f"{task.prompt}\n{task.solution}\n{task.answer}"


def _recall(rng: random.Random) -> str:
    """Several names and codes, each told once and then asked again and again; at times with problems in between."""
    if rng.random() < 0.3:
        return _asked(rng, *_planted(rng, rng.randint(1, 4)), times=24)
    names = rng.sample(NAMES, rng.randint(3, 8))
    codes = {name: rng.choice(_CODES) for name in names}
    return _asked(rng, [f"{name}={codes[name]}" for name in names], codes, times=40)


def _long_recall(rng: random.Random) -> str:
    return _asked(rng, *_planted(rng, rng.randint(8, 28)), times=16)


def _asked(rng: random.Random, lines: list[str], codes: dict[str, str], times: int) -> str:
    asked = rng.choices(sorted(codes), k=times)
    return "\n".join([*lines, *(f"{name}={codes[name]}" for name in asked)])
