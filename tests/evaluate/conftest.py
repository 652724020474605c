"""A taught model in a folder, problem sets of every kind, and held-out text."""

from pathlib import Path

import pytest

from pensar.base.stage import Runtime
from pensar.tasks.problems import ProblemsConfig, run
from tiny import save, taught, write_shards


@pytest.fixture(scope="session")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory of the taught model."""
    model, tokenizer = taught()
    return save(model, tokenizer, tmp_path_factory.mktemp("evaluated") / "model")


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated-sets")
    config = ProblemsConfig(
        cold_start=2, reinforcement=2, general=2, validation=4, evaluation=12, recall_lines=2
    )
    run(config, {}, folder, Runtime(logs=folder.with_name("evaluated-logs")))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of 20 to 59 tokens, of which every fifth is held out."""
    _, tokenizer = taught()
    text = tokenizer.encode("True or false, left to right: " + "T and F or T xor F, " * 20)
    documents = [text[: 20 + n] for n in range(40)]
    folder = tmp_path_factory.mktemp("evaluated-shards") / "shards"
    return write_shards(folder, documents, end=tokenizer.pad_id, vocab_size=tokenizer.vocab_size)
