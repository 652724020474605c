"""The guard: what it calls bad, what it leaves out, and the same bytes whenever the run is killed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_work

from pensar.base.errors import ConfigError, RunError
from pensar.base.files import files_under
from pensar.base.progress import Progress
from pensar.base.ranks import Crew, World
from pensar.text.packing import Batch, collate
from pensar.text.sample import Sample
from pensar.train import checkpoint
from pensar.train.average import AverageConfig
from pensar.train.guard import BadStep, Guard, GuardConfig, Skipped
from pensar.train.loop import LoopConfig, Place, fit, loop
from pensar.train.optimizer import Optimizer, OptimizerConfig
from tiny import SPARSE, parameters_of, tiny_model

# ---------------------------------------------------------------- the verdict


def values(loss: float, norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "gradient_norm": norm}


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        (values(float("nan")), "the loss is not finite (loss nan)"),
        (values(float("inf"), float("nan")), "the loss is not finite (loss inf, gradient_norm nan)"),
        (values(1.0, float("inf")), "the gradient's norm is inf"),
        ({"divergence": float("nan"), "gradient_norm": 1.0}, "the loss is not finite (divergence nan)"),
    ],
)
def test_what_is_not_finite_is_bad_whatever_the_configuration(
    metrics: Mapping[str, float], reason: str
) -> None:
    with pytest.raises(BadStep) as caught:
        Guard(GuardConfig()).judge(metrics)
    assert caught.value.reason == reason
    assert str(caught.value).endswith("; lower the learning rate or look at the batch's data")


def test_a_spike_lies_so_many_robust_deviations_above_the_median_of_the_window() -> None:
    rng = np.random.default_rng(0)
    guard = Guard(GuardConfig(spike_sigma=4, window=16))
    losses = [float(3 + 0.1 * rng.normal()) for _ in range(40)]
    for loss in losses:
        guard.judge(values(loss, 2 * loss))
    window = np.array(losses[-16:])
    median = np.median(window)
    edge = float(median + 4 * 1.4826 * np.median(np.abs(window - median)))
    twin = Guard(guard.config)
    twin.load_state_dict(guard.state_dict())
    for name in ("loss", "gradient_norm"):
        high = {"loss": edge + 0.001, "gradient_norm": 2 * edge + 0.001}[name]
        with pytest.raises(BadStep, match=rf"{name} .* robust deviations above the median"):
            guard.judge(values(float(median), float(2 * median)) | {name: high})
    # A low loss is none, and what was refused left no trace in the window.
    assert guard.state_dict() == twin.state_dict()
    guard.judge(values(edge - 0.001, 0.1))


def test_no_spike_is_called_before_half_a_window_and_equal_losses_are_no_trap() -> None:
    guard = Guard(GuardConfig(spike_sigma=3, window=8))
    for _ in range(3):
        guard.judge(values(1.0))
    guard.judge(values(50.0))
    for _ in range(8):
        guard.judge(values(1.0))
    guard.judge(values(1.001))
    with pytest.raises(BadStep):
        guard.judge(values(1.1))


def test_optimiser_steps_take_the_data_steps_that_are_left() -> None:
    guard = Guard(GuardConfig(on_bad_step="skip"))
    assert [guard.data_step(step) for step in range(3)] == [0, 1, 2]
    guard.skip(2, 2, BadStep("bad"))
    guard.skip(2, 4, BadStep("worse"))
    guard.skip(9, 9, BadStep("again"))
    gone = {2, 3, 4, 5, 13}
    assert {n for gap in guard.skipped for n in range(gap.first, gap.last + 1)} == gone
    left = [n for n in range(40) if n not in gone]
    assert [guard.data_step(step) for step in range(30)] == left[:30]


def test_odd_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"window at least 2 steps"):
        GuardConfig(window=1)


# ---------------------------------------------------------------- in the loop


class Killed(Exception):
    """Stands for whatever ends a process."""


def rows(step: int, *, weight: float = 1.0, wild: bool = False) -> Batch:
    """Rows that are soon learned, their weights those of the step; `wild` ones are not of their kind."""
    rng = np.random.default_rng(step)
    samples = []
    for _ in range(2):
        tokens = rng.integers(0, 300, 10) if wild else 7 * np.arange(1, 11)
        ce = weight * rng.uniform(0.5, 1.5, 10)
        samples.append(Sample(tokens=tokens.astype(np.int32), ce=ce.astype(np.float32)))
    return collate([[sample] for sample in samples], length=12)


def data(bad: Mapping[int, str]) -> Callable[[int], list[Batch]]:
    """Data step -> its batch; the bad ones are `nan` or `wild`."""

    def batches_of(step: int) -> list[Batch]:
        kind = bad.get(step)
        return [rows(step, weight=float("nan") if kind == "nan" else 1.0, wild=kind == "wild")]

    return batches_of


def place(folder: Path) -> Place:
    folder.mkdir(exist_ok=True)
    return Place(folder, folder.with_name(folder.name + "-logs"), World(), Progress())


def config_of(guard: GuardConfig, **changes: Any) -> LoopConfig:
    optimizer = OptimizerConfig(lr=0.02, adamw_lr=0.02)
    return LoopConfig(steps=24, checkpoint_every=3, optimizer=optimizer, guard=guard, **changes)


def trained(
    folder: Path, config: LoopConfig, batches_of: Callable[[int], list[Batch]], **changes: Any
) -> tuple[torch.Tensor, dict[str, bytes]]:
    """The final weights and every file of the artifact."""
    model = tiny_model(**changes)
    fit(model, batches_of, config, place(folder), name="guarded")
    checkpoint.discard(folder, World())
    return parameters_of(model), {name: path.read_bytes() for name, path in files_under(folder).items()}


SKIP = GuardConfig(on_bad_step="skip", spike_sigma=12, window=12)
REWIND = GuardConfig(on_bad_step="rewind", spike_sigma=12, window=12)
CASES = {
    "skip": (SKIP, {0: "nan", 4: "nan", 5: "nan", 22: "wild"}, [(0, 0), (4, 4), (5, 5), (22, 22)]),
    # Steps 0..4 and a bad 5: back to 3. Then data 6, 7, 8 are steps 3, 4, 5, and 8 is bad: to 3 again.
    "rewind": (REWIND, {5: "nan", 8: "nan", 26: "wild"}, [(3, 5), (6, 8), (24, 26)]),
    "rewind at the start": (REWIND, {0: "nan", 2: "nan"}, [(0, 0), (1, 2)]),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@cases
@pytest.mark.parametrize("changes", [{}, SPARSE], ids=["dense", "sparse"])
def test_a_guarded_run_is_a_run_on_the_data_that_it_left(
    tmp_path: Path, case: tuple[GuardConfig, dict[int, str], list[tuple[int, int]]], changes: dict[str, Any]
) -> None:
    guard, bad, ranges = case
    gone = {n for first, last in ranges for n in range(first, last + 1)}
    left = [n for n in range(60) if n not in gone]
    expected, clean = trained(
        tmp_path / "clean", config_of(GuardConfig()), lambda n: data({})(left[n]), **changes
    )
    found, files = trained(tmp_path / "guarded", config_of(guard), data(bad), **changes)
    assert torch.equal(found, expected)
    skipped = json.loads(files.pop("skipped.json"))
    assert files == clean
    assert [(row["first"], row["last"]) for row in skipped] == ranges
    assert all(row["reason"].startswith(("the loss is not finite", "loss ", "gradient")) for row in skipped)


@cases
def test_a_run_killed_anywhere_ends_in_the_same_bytes(
    tmp_path: Path, case: tuple[GuardConfig, dict[int, str], list[tuple[int, int]]]
) -> None:
    guard, bad, _ = case
    config = config_of(guard, average=AverageConfig(ema=0.9))
    whole, files = trained(tmp_path / "whole", config, data(bad))
    assert {"metrics.jsonl", "skipped.json"} == set(files)
    for call in (2, 5, 7, 8, 11, 14, 19, 23):
        folder, calls = tmp_path / f"cut-{call}", iter(range(call + 1))

        def dying(step: int, calls: Any = calls) -> list[Batch]:
            if next(calls, None) is None:
                raise Killed
            return data(bad)(step)

        with pytest.raises(Killed):
            trained(folder, config, dying)
        again, repeated = trained(folder, config, data(bad))
        assert torch.equal(again, whole)
        assert repeated == files


def test_a_step_that_is_bad_by_chance_leaves_no_trace_after_a_restart(tmp_path: Path) -> None:
    """Killed after a rewind that no checkpoint knows of, on a machine that errs no more."""
    whole, files = trained(tmp_path / "whole", config_of(REWIND), data({}))
    calls = iter(range(8))

    def erring(step: int) -> list[Batch]:
        if next(calls, None) is None:
            raise Killed
        return data({5: "nan"})(step)

    with pytest.raises(Killed):
        trained(tmp_path / "cut", config_of(REWIND), erring)
    assert (tmp_path / "cut" / "skipped.json").exists()
    again, repeated = trained(tmp_path / "cut", config_of(REWIND), data({}))
    assert torch.equal(again, whole)
    assert repeated == files


def test_by_default_a_bad_step_ends_the_run_before_its_update(tmp_path: Path) -> None:
    model = tiny_model()
    before: list[torch.Tensor] = []

    def batches_of(step: int) -> list[Batch]:
        before.append(parameters_of(model))
        return data({4: "nan"})(step)

    with pytest.raises(RunError, match=r"the loss is not finite \(loss nan.*lower the learning rate"):
        fit(model, batches_of, config_of(GuardConfig()), place(tmp_path / "run"), name="stop")
    assert len(before) == 5
    assert torch.equal(parameters_of(model), before[-1])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not (tmp_path / "run" / "skipped.json").exists()


def test_a_spike_stops_a_run_that_shall_stop(tmp_path: Path) -> None:
    stop = GuardConfig(spike_sigma=8, window=8)
    with pytest.raises(RunError, match=r"robust deviations above the median .* guard\.spike_sigma 8"):
        trained(tmp_path / "run", config_of(stop), data({16: "wild"}))


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_run_stops_at_one_bad_step_too_many(tmp_path: Path, policy: Any) -> None:
    guard = GuardConfig(on_bad_step=policy, limit=2)
    with pytest.raises(RunError, match=r"after 2 others that were left behind, .*raise guard\.limit"):
        trained(tmp_path / "run", config_of(guard), data(dict.fromkeys(range(4, 60), "nan")))
    assert len(json.loads((tmp_path / "run" / "skipped.json").read_bytes())) == 2


def test_a_stage_that_makes_its_own_data_can_only_stop(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig())
    with pytest.raises(ConfigError, match=r"it can only stop at a bad step; leave guard out"):
        loop(model, optimizer, config_of(SKIP), place(tmp_path), lambda _: {}, name="own", shown=())


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_all_ranks_leave_a_step_that_is_bad_on_one_of_them(pair: Crew, tmp_path: Path, policy: Any) -> None:
    """Only the second row, that of rank 1, holds what is not finite."""
    batches = [rows(step) for step in range(12)]
    batches[4].ce[1, 3] = float("inf")  # type: ignore[index]
    config = LoopConfig(
        steps=6, checkpoint_every=2, optimizer=OptimizerConfig(lr=0.01), guard=GuardConfig(on_bad_step=policy)
    )
    found = []
    for crew, name in ((Crew(), "one"), (pair, "two")):
        (tmp_path / name).mkdir()
        found.append(crew.call(train_work.fitted, batches, config, tmp_path / name))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    one, two = ((tmp_path / name / "skipped.json").read_bytes() for name in ("one", "two"))
    assert one == two
    gap = json.loads(two)[0]
    assert (gap["step"], gap["back_to"], gap["first"], gap["last"]) == (4, 4, 4, 4)


def test_a_guard_s_state_is_its_own(tmp_path: Path) -> None:
    guard = Guard(GuardConfig(on_bad_step="skip", spike_sigma=3))
    guard.judge(values(1.0))
    guard.skip(1, 1, BadStep("bad"))
    state = json.loads(json.dumps(guard.state_dict()))
    again = Guard(guard.config)
    again.load_state_dict(state)
    assert again.state_dict() == guard.state_dict()
    assert again.skipped == [Skipped(step=1, back_to=1, first=1, last=1, reason="bad")]
