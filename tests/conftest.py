"""Fixtures that every room's tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; tests that want it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real-data folder not present")
    return folder


@pytest.fixture(scope="session")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory of the taught model; tests only read it."""
    from tiny import save, taught

    model, tokenizer = taught()
    return save(model, tokenizer, tmp_path_factory.mktemp("school") / "model")


@pytest.fixture(scope="session")
def make_sets(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_sets(evaluation=12, ...)` is a folder of problem sets of every kind, with so many problems in each."""
    from pensar.base.stage import Runtime
    from pensar.tasks.problems import ProblemsConfig, run

    def make(**counts: int) -> Path:
        folder = tmp_path_factory.mktemp("sets")
        run(ProblemsConfig(**counts), {}, folder, Runtime(logs=folder.with_name(f"{folder.name}-logs")))
        return folder

    return make
