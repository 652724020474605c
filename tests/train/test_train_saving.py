"""Checkpoints are written beside training, count when every rank has written, and survive a kill at any moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import saving_work
import torch

from pensar.base.ranks import Crew, World
from pensar.train import checkpoint, sharded
from pensar.train.background import Background, Copies
from pensar.train.optimizer import Optimizer, OptimizerConfig
from tiny import tiny_model

Moment = Callable[[Path], bool]


def test_training_goes_on_while_a_checkpoint_is_written(pair: Crew, tmp_path: Path) -> None:
    found = pair.call(saving_work.going_on, tmp_path / "run")
    assert found["early"] is None
    assert found["finished"] == 1
    # What was written is the state when the save began, not what training made of it meanwhile.
    assert all(torch.equal(found["loaded"][name], value) for name, value in found["then"].items())
    assert not all(torch.equal(found["later"][name], value) for name, value in found["then"].items())


def test_what_one_rank_cannot_write_is_an_error_on_all(pair: Crew, tmp_path: Path) -> None:
    said, step = pair.call(saving_work.failing, tmp_path / "run")
    assert len(said) == 2
    for text in said:
        assert "cannot write the checkpoint" in text
        assert "No space left on device" in text
        assert "free disk space" in text
    assert step == 1


@pytest.mark.parametrize("layout", ["shard=2", "replicate=2"])
def test_the_copies_of_all_ranks_are_the_state_once(pair: Crew, layout: str, tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig())
    state = [*model.parameters(), *optimizer.state_dict().values()]
    assert pair.call(saving_work.bytes_of_copies, layout, tmp_path / "run") == sum(t.nbytes for t in state)


def test_work_in_the_background_is_done_by_all_before_rank_0_goes_on(pair: Crew) -> None:
    assert pair.call(saving_work.beside, -1) == ([10, 11, 10, 11], ["", ""])
    made, said = pair.call(saving_work.beside, 1)
    assert (made, said) == ([], ["ValueError: bad luck"] * 2)


def test_a_copy_stays_what_it_was_and_its_memory_is_used_again() -> None:
    copies, tensor = Copies(), torch.arange(6.0)
    held = copies.of({"a": tensor})
    tensor += 1
    assert held["a"].tolist() == [0, 1, 2, 3, 4, 5]
    again = copies.of({"a": tensor, "b": tensor})
    assert again["a"].data_ptr() == held["a"].data_ptr()
    assert again["a"].tolist() == tensor.tolist()
    assert copies.num_bytes == 48
    assert copies.of({"b": tensor[:2]})["b"].tolist() == [1, 2]
    assert copies.num_bytes == 8


def test_the_newest_complete_checkpoint_counts_whole_or_in_parts(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig())

    def parts(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / sharded.EXTRA).touch()
        return tmp_path / name

    assert sharded.last(tmp_path) is None
    with Background(World()) as background:
        checkpoint.begin(tmp_path, model, optimizer, 6, background, {})
    whole = tmp_path / checkpoint.NAME
    older = parts("sharded-00000005")  # as a kill leaves it that comes before it is removed
    assert sharded.last(tmp_path) == whole
    newer = parts("sharded-00000007")
    (tmp_path / sharded.DRAFT).mkdir()
    assert sharded.last(tmp_path) == newer
    again = parts("sharded-00000007+")
    assert sharded.last(tmp_path) == again
    for path in (again, newer):
        (path / sharded.EXTRA).unlink()
    assert sharded.last(tmp_path) == whole
    assert checkpoint.resume(tmp_path, model, optimizer) == (6, {})
    sharded.remove(tmp_path)
    assert not older.exists()


PARTS = {
    "parts are being written": lambda folder: any((folder / sharded.DRAFT).glob("*.distcp")),
    "all parts are there": lambda folder: any((folder / sharded.DRAFT).glob(".metadata*")),
    "all but the name is there": lambda folder: (folder / sharded.DRAFT / sharded.EXTRA).exists(),
    "a later one is complete": lambda folder: len(list(folder.glob("sharded-*"))) > 1,
}
WHOLE = {
    "it is being written": lambda folder: (folder / f".{checkpoint.NAME}.tmp").exists(),
    "one is there": lambda folder: (folder / checkpoint.NAME).exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "moments"), [("shard=2", PARTS), ("", WHOLE)])
def test_a_kill_at_any_moment_leaves_a_checkpoint_to_go_on_from(
    layout: str, moments: dict[str, Moment], tmp_path: Path
) -> None:
    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        tests = Path(__file__).parent
        path = os.pathsep.join([str(tests), str(tests.parent), *filter(None, sys.path)])
        return subprocess.Popen(
            [sys.executable, str(tests / "saving_work.py"), layout, str(folder)],
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def finished(folder: Path) -> dict[str, torch.Tensor]:
        assert start(folder).wait(300) == 0
        loaded: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
        return loaded

    through, killed, reached = finished(tmp_path / "through"), tmp_path / "killed", []
    for name, moment in moments.items():
        process, end = start(killed), time.monotonic() + 300
        while not moment(killed):
            assert process.poll() is None, f"the run ended before {name}"
            assert time.monotonic() < end, name
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reached.append(sharded.last(killed))
    again = finished(killed)
    assert reached[-1] is not None
    assert all(torch.equal(again[name], value) for name, value in through.items())
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("through", "killed")]
    assert files[0] == files[1]
