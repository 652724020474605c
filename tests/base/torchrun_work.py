"""What the test of torchrun runs in each of its processes: `python torchrun_work.py FOLDER`."""

import os
import sys
import traceback
from pathlib import Path

import torch

from pensar.base import torchrun
from pensar.base.ranks import World


def total(world: World, value: float) -> tuple[float, list[int]]:
    """The sum over the ranks of (rank + 1) * value, and the ranks."""
    tensor = torch.tensor([(world.rank + 1) * value])
    return float(world.all_reduce_(tensor)), world.gather(world.rank)


def dies_once(world: World, flag: Path) -> int:
    """How many ranks are there; the last of them is killed the first time."""
    if world.rank == world.size - 1 and not flag.exists():
        flag.touch()
        os._exit(9)
    world.barrier()
    return world.size


def main() -> int:
    if torchrun.is_follower():
        return torchrun.follow()
    folder = Path(sys.argv[1])
    with torchrun.TorchrunCrew() as crew:
        assert crew.ranks == 2
        result = crew.call(total, 10.0)
        ranks = crew.call(dies_once, folder / "flag")
        crew.reset_peaks()
        peaks = sorted(crew.usage())
    (folder / "result").write_text(f"{result} {ranks} {peaks} {os.environ['TORCHELASTIC_RESTART_COUNT']}")
    torchrun.release()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:  # noqa: BLE001 - whatever it is, it is said and ends the process
        traceback.print_exc()
        torchrun.leave(1)
