"""Problem sets with a few problems of every kind, and held-out text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tiny import taught, write_shards


@pytest.fixture(scope="session")
def sets(make_sets: Callable[..., Path]) -> Path:
    return make_sets(cold_start=2, reinforcement=2, general=2, validation=4, evaluation=12, recall_lines=2)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of 20 to 59 tokens, of which every fifth is held out."""
    _, tokenizer = taught()
    text = tokenizer.encode("True or false, left to right: " + "T and F or T xor F, " * 20)
    documents = [text[: 20 + n] for n in range(40)]
    folder = tmp_path_factory.mktemp("evaluated-shards") / "shards"
    return write_shards(folder, documents, end=tokenizer.pad_id, vocab_size=tokenizer.vocab_size)
