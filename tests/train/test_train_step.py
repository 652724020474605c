"""A step: the same over ranks and micro-batches, refused when it is not finite, and taken up after a crash."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import train_work

from pensar.base.errors import RunError
from pensar.base.files import files_under
from pensar.base.progress import Progress
from pensar.base.ranks import Crew, World
from pensar.text.packing import Batch, collate
from pensar.text.sample import Sample
from pensar.train import checkpoint
from pensar.train.loop import LoopConfig, Place, fit
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import share, train_step
from tiny import SPARSE, parameters_of, tiny_model

ADAMW = OptimizerConfig(muon=False, adamw_lr=0.001)


def rows(num: int, seed: int, *streams: str) -> Batch:
    """`num` rows of one sample each, of unlike lengths and weights."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(num):
        length = int(rng.integers(5, 12))
        values = {name: np.abs(rng.normal(size=length)).astype(np.float32) for name in streams}
        samples.append(Sample(tokens=rng.integers(0, 300, length).astype(np.int32), **values))
    return collate([[sample] for sample in samples], length=12)


def parts_of(batch: Batch, *sizes: int) -> list[Batch]:
    ends = np.cumsum(sizes)
    return [batch.rows(slice(int(end - size), int(end))) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("muon", [True, False])
def test_two_ranks_do_what_one_does(pair: Crew, muon: bool) -> None:
    """Odd numbers of rows, a micro-batch of a single row, all three terms, two steps."""
    streams = ("ce", "pg", "kl")
    work = [[rows(3, 1, *streams), rows(1, 2, *streams)], [rows(2, 3, *streams)]]
    optimizer = OptimizerConfig(muon=muon, lr=0.002, adamw_lr=0.001)
    arguments = ({}, work, LossConfig(), optimizer, True)
    metrics, parameters = Crew().call(train_work.steps, *arguments)
    shared_metrics, shared_parameters = pair.call(train_work.steps, *arguments)
    torch.testing.assert_close(shared_parameters, parameters, rtol=0, atol=1e-5)
    for mine, theirs in zip(metrics, shared_metrics, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)
        assert {"loss", "policy_loss", "divergence", "gradient_norm", "tokens"} <= set(mine)
        assert "balance" not in mine


def test_micro_batches_do_what_the_whole_batch_does() -> None:
    whole = rows(6, 4, "ce", "pg", "kl")
    arguments = (LossConfig(), ADAMW, True)
    metrics, parameters = train_work.steps(World(), {}, [[whole]], *arguments)
    cut_metrics, cut = train_work.steps(World(), {}, [parts_of(whole, 1, 3, 2)], *arguments)
    torch.testing.assert_close(cut, parameters, rtol=0, atol=1e-5)
    assert metrics[0] == pytest.approx(cut_metrics[0], abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, SPARSE], ids=["dense", "sparse"])
def test_two_runs_on_the_same_ranks_agree_in_every_bit(pair: Crew, changes: dict[str, object]) -> None:
    work = [[rows(3, 3 * n, "ce"), rows(2, 3 * n + 1, "ce")] for n in range(3)]
    arguments = (changes, work, LossConfig(z_loss=1e-3, router_z_loss=1e-2), OptimizerConfig(), False)
    metrics, parameters = pair.call(train_work.steps, *arguments)
    again, repeated = pair.call(train_work.steps, *arguments)
    assert metrics == again
    assert torch.equal(parameters, repeated)
    assert ("expert_overload" in metrics[0]) == bool(changes)


def test_every_row_has_one_rank() -> None:
    batch = rows(5, 0, "ce")
    shares = [share(batch, World(rank, 3)) for rank in range(3)]
    assert [len(part.tokens) for part in shares if part] == [2, 2, 1]
    assert sorted(row.tolist() for part in shares if part for row in part.tokens) == sorted(
        batch.tokens.tolist()
    )
    assert share(rows(1, 0, "ce"), World(1, 2)) is None


def test_a_loss_that_is_not_finite_is_refused_before_the_update() -> None:
    model = tiny_model()
    optimizer = Optimizer(model, ADAMW)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = parameters_of(model)
    with pytest.raises(RunError, match=r"the loss is not finite .*lower the learning rate"):
        train_step(model, optimizer, [rows(2, 0, "ce")], 1.0, World(), LossConfig())
    torch.testing.assert_close(parameters_of(model), before, equal_nan=True, rtol=0, atol=0)


# ---------------------------------------------------------------- crash and resume


class Killed(Exception):
    """Stands for whatever ends a process."""


def batches_until(last: int) -> Callable[[int], list[Batch]]:
    def batches_of(step: int) -> list[Batch]:
        if step == last:
            raise Killed
        return [rows(2, step, "ce")]

    return batches_of


def place(folder: Path) -> Place:
    folder.mkdir(exist_ok=True)
    return Place(folder, folder.with_name(folder.name + "-logs"), World(), Progress())


@pytest.mark.parametrize("changes", [{}, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_killed_run_goes_on_to_the_very_same_bytes(
    tmp_path: Path, killed_at: int, changes: dict[str, object]
) -> None:
    config = LoopConfig(steps=6, checkpoint_every=2, optimizer=OptimizerConfig(lr=0.01))
    whole = tiny_model(**changes)
    fit(whole, batches_until(-1), config, place(tmp_path / "whole"), name="whole")
    with pytest.raises(Killed):
        fit(tiny_model(**changes), batches_until(killed_at), config, place(tmp_path / "cut"), name="cut")
    assert (tmp_path / "cut" / "checkpoint.pt").exists() == (killed_at == 5)
    again = tiny_model(**changes)
    fit(again, batches_until(-1), config, place(tmp_path / "cut"), name="cut")
    assert torch.equal(parameters_of(whole), parameters_of(again))
    for folder in ("whole", "cut"):
        checkpoint.discard(tmp_path / folder, World())
    files = [
        {name: path.read_bytes() for name, path in files_under(tmp_path / folder).items()}
        for folder in ("whole", "cut")
    ]
    assert files[0] == files[1]
    assert set(files[0]) == {"metrics.jsonl"} | ({"experts.json"} if changes else set())
    assert files[0]["metrics.jsonl"].count(b"\n") == 6
    assert not again.training


def test_a_checkpoint_brings_back_everything(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig())
    train_step(model, optimizer, [rows(2, 0, "ce")], 1.0, World(), LossConfig())
    checkpoint.save(tmp_path, model, optimizer, 1, World(), note="so far")
    other = tiny_model(seed=5)
    other_optimizer = Optimizer(other, OptimizerConfig())
    assert checkpoint.resume(tmp_path, other, other_optimizer) == (1, {"note": "so far"})
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train_step(m, o, [rows(2, 1, "ce")], 0.5, World(), LossConfig())
    assert torch.equal(parameters_of(model), parameters_of(other))
    assert checkpoint.resume(tmp_path / "elsewhere", model, optimizer) == (0, {})


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig())
    checkpoint.save(tmp_path, model, optimizer, 1, World())

    def full(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*free disk space"):
        checkpoint.save(tmp_path, model, optimizer, 2, World())
    assert checkpoint.resume(tmp_path, model, optimizer)[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME], (
        "half a file is left on a full disk"
    )
