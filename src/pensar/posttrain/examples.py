"""Examples: conversations to learn from, and their order as a pure function of (seed, step)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from pensar.base.errors import DataError
from pensar.base.files import read_jsonl, seed_of
from pensar.tasks.task import Task
from pensar.text.chat import encode_training
from pensar.text.conversation import Conversation
from pensar.text.packing import Batch, one_per_row
from pensar.text.sample import Sample
from pensar.text.tokenizer import Tokenizer

_GROUP = 8
"""Batches whose samples are sorted by length together: less padding, still well mixed."""


class Example(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation that ends with the reply to learn."""

    id: str
    conversation: Conversation
    thinking: bool | None = None
    """False where the prompt gives the empty thinking block; else the reply opens its own."""
    kind: str = ""
    """What it teaches, for the counts."""


def queries_of(tasks: Path, name: str) -> list[Task]:
    """The problem set `name` of the train split."""
    return list(read_jsonl(path_of(tasks, name), Task))


def path_of(tasks: Path, name: str) -> Path:
    """The file of a problem set of the train split."""
    return tasks / "train" / f"{name}.jsonl"


def num_learned(queries: Sequence[Task], held_out: int, path: Path, what: str = "queries") -> int:
    """How many of the queries, the first of them, are learned from where the last `held_out` are not; DataError for
    none."""
    if len(queries) <= held_out:
        raise DataError(
            f"{path} has {len(queries)} {what}, {held_out} are held out; ask for more of them under `tasks`, or lower "
            "held_out"
        )
    return len(queries) - held_out


def encode(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Sample]:
    """Samples with the cross-entropy on the last assistant turn."""
    return [
        encode_training(tokenizer, example.conversation, thinking=example.thinking) for example in examples
    ]


def in_batches(samples: Sequence[Sample], batch_size: int, seed: int) -> Callable[[int], list[Batch]]:
    """Step -> its batch; every epoch is a new permutation, cut into batches of samples of similar length.

    Raises DataError when there is nothing to learn from.
    """
    if not samples:
        raise DataError(
            "no example is left to learn from: every candidate was dropped; ask more queries, loosen the filters, or "
            "begin with a stronger model"
        )
    batch_size = min(batch_size, len(samples))
    per_epoch = len(samples) // batch_size
    cache: dict[int, list[np.ndarray]] = {}

    def batches_of(step: int) -> list[Batch]:
        epoch, index = divmod(step, per_epoch)
        if epoch not in cache:
            cache.clear()
            cache[epoch] = _epoch(samples, batch_size, seed_of(seed, "epoch", epoch))
        return [one_per_row([samples[i] for i in cache[epoch][index]])]

    return batches_of


def _epoch(samples: Sequence[Sample], batch_size: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(samples))[: len(samples) // batch_size * batch_size]
    batches: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * _GROUP):
        group = order[start : start + batch_size * _GROUP]
        group = group[np.argsort([len(samples[i]) for i in group], kind="stable")]
        batches.extend(group.reshape(-1, batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]
