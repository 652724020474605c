"""Processes that torchrun starts are a crew, and start again when one dies."""

import subprocess
import sys
from pathlib import Path

import pytest

from pensar.base import torchrun

WORK = Path(__file__).parent / "torchrun_work.py"
ROOT = Path(__file__).parent.parent.parent


def torchrun_command(*arguments: str, restarts: int = 0) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "--max-restarts", str(restarts), *arguments]


def test_a_crew_of_torchrun_calls_all_ranks_and_survives_the_death_of_one(tmp_path: Path) -> None:
    command = torchrun_command(str(WORK), str(tmp_path), restarts=1)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    # 1 x 10 + 2 x 10, in the second life of both ranks.
    assert (tmp_path / "result").read_text() == "(30.0, [0, 1]) 2 [0, 1] 1"


def test_this_process_was_not_started_by_torchrun() -> None:
    assert not torchrun.launched()
    assert not torchrun.is_follower()


@pytest.mark.slow
def test_a_recipe_runs_on_the_ranks_of_torchrun_with_its_layout(tmp_path: Path) -> None:
    recipe = [
        "-m",
        "pensar",
        "run",
        "recipes/tiny.yaml",
        "--root",
        str(tmp_path),
        "--until",
        "pretrain-general",
    ]
    changes = ["--set", "runtime.layout=shard=2", "--set", "pretraining.general.tokens=20000", "--quiet"]
    command = torchrun_command(*recipe, *changes)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "tiny").glob("pretrain-general-*")
    assert (folder / "model.safetensors").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 19
