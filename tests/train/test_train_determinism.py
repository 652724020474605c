"""The deterministic mode, and that two runs give the same bits."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_work import batches
from torch.backends import cudnn

from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.train.determinism import deterministic
from pensar.train.loop import LoopConfig, Place, fit
from tiny import SPARSE, parameters_of, tiny_model


def test_within_it_everything_is_deterministic_and_afterwards_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(cudnn, "benchmark", True)
    state, drawn = torch.get_rng_state(), []
    for _ in range(2):
        with deterministic(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert not torch.are_deterministic_algorithms_enabled()
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    torch.set_rng_state(state)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("changes", [{}, SPARSE], ids=["dense", "sparse"])
def test_two_runs_give_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    def trained(name: str, on: bool) -> torch.Tensor:
        model, out = tiny_model(**changes), tmp_path / name
        place = Place(out, out.with_name(name + "-logs"), World(), Progress())
        fit(model, lambda step: batches(step, 4), LoopConfig(steps=4, deterministic=on), place, name="test")
        return parameters_of(model)

    first = trained("first", True)
    assert torch.equal(first, trained("second", True))
    assert torch.equal(first, trained("as it is", False))  # a processor computes the same either way
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
