"""Averages of the weights: against the formulas in NumPy, and the same after a kill."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pensar.base.config import canonical
from pensar.base.errors import ConfigError
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.train.average import Average, AverageConfig
from pensar.train.loop import LoopConfig, Place, loop
from pensar.train.optimizer import Optimizer, OptimizerConfig
from tiny import parameters_of, tiny_model

STEPS = 11


class Killed(Exception):
    """Stands for whatever ends a process."""


def trained(
    folder: Path, average: AverageConfig, *, killed_at: int = -1
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The stage's final weights, and those after every step, by random gradients."""
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig(muon=False, adamw_lr=0.05))
    seen: dict[int, np.ndarray] = {}

    def take(step: int) -> dict[str, float]:
        if step == killed_at:
            raise Killed
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(1.0, World())
        seen[step + 1] = parameters_of(model).double().numpy()
        return {"tokens": 1.0}

    folder.mkdir(exist_ok=True)
    config = LoopConfig(steps=STEPS, checkpoint_every=3, average=average)
    place = Place(folder, folder.with_name(folder.name + "-logs"), World(), Progress())
    loop(model, optimizer, config, place, take, name="average", shown=())
    return parameters_of(model).double().numpy(), seen


def exponential(decay: float) -> Callable[[dict[int, np.ndarray]], np.ndarray]:
    def mean(seen: dict[int, np.ndarray]) -> np.ndarray:
        weights = np.array([decay ** (STEPS - step) for step in seen])
        return np.average(list(seen.values()), axis=0, weights=weights)

    return mean


CASES = [
    (AverageConfig(ema=0.8), exponential(0.8)),
    (AverageConfig(ema=0.99), exponential(0.99)),
    (AverageConfig(checkpoints=1), lambda seen: seen[11]),
    (AverageConfig(checkpoints=3), lambda seen: np.mean([seen[6], seen[9], seen[11]], axis=0)),
    (AverageConfig(checkpoints=9), lambda seen: np.mean([seen[n] for n in (3, 6, 9, 11)], axis=0)),
    (AverageConfig(), lambda seen: seen[11]),
]


@pytest.mark.parametrize(("config", "mean"), CASES, ids=[str(canonical(config)) for config, _ in CASES])
def test_the_final_weights_are_the_mean_by_the_formula(
    tmp_path: Path, config: AverageConfig, mean: Callable[[dict[int, np.ndarray]], np.ndarray]
) -> None:
    found, seen = trained(tmp_path / "run", config)
    np.testing.assert_allclose(found, mean(seen), atol=1e-6)


@pytest.mark.parametrize("config", [AverageConfig(ema=0.8), AverageConfig(checkpoints=3)])
@pytest.mark.parametrize("killed_at", [2, 7, 10])
def test_a_killed_run_ends_in_the_same_average(tmp_path: Path, config: AverageConfig, killed_at: int) -> None:
    whole, _ = trained(tmp_path / "whole", config)
    with pytest.raises(Killed):
        trained(tmp_path / "cut", config, killed_at=killed_at)
    again, _ = trained(tmp_path / "cut", config)
    assert (whole == again).all()


def test_what_is_loaded_is_a_copy(tmp_path: Path) -> None:
    """A checkpoint's tensors are pages of its file: an average that kept them would keep a removed file alive."""
    config = AverageConfig(ema=0.5)
    model = tiny_model()
    first = Average(model, config, STEPS, 3)
    first.update(1)
    state = first.state_dict()
    again = Average(model, config, STEPS, 3)
    again.load_state_dict(state)
    mine, theirs = again.state_dict()["mean"], state["mean"]
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not {mean.data_ptr() for mean in mine.values()} & {mean.data_ptr() for mean in theirs.values()}


def test_half_precision_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    """Each step moves by less than the weights' own type could add to a mean."""
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    config = LoopConfig(steps=64, average=AverageConfig(ema=0.9999))
    optimizer = Optimizer(model, OptimizerConfig(muon=False))

    def take(step: int) -> dict[str, float]:
        with torch.no_grad():
            model.weight.fill_(1 if step < 48 else 2)
        return {"tokens": 1.0}

    place = Place(tmp_path / "run", tmp_path / "logs", World(), Progress())
    loop(model, optimizer, config, place, take, name="half", shown=())  # type: ignore[arg-type]
    assert model.weight.item() == pytest.approx(1.25, abs=2**-7)


def test_two_averages_at_once_and_odd_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"two models; set one of them to 0"):
        AverageConfig(ema=0.9, checkpoints=2)
    with pytest.raises(ConfigError, match=r"ema 1.0 is in \[0, 1\)"):
        AverageConfig(ema=1.0)
    with pytest.raises(ConfigError, match=r"checkpoints at least 0|checkpoints -1"):
        AverageConfig(checkpoints=-1)


def test_defaults_do_not_change_what_a_stage_is() -> None:
    assert canonical(LoopConfig(steps=3)) == {"steps": 3}
