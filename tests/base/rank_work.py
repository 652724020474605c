"""Functions that the tests run on ranks; workers must be able to import them."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from pensar.base.errors import DataError
from pensar.base.ranks import World


def exchange(world: World, values: list[float]) -> dict[str, object]:
    mine = torch.tensor(values) * (world.rank + 1)
    world.barrier()
    return {
        "sum": world.all_reduce_(mine).tolist(),
        "gathered": world.gather({"rank": world.rank, "text": "x" * (10 * world.rank)}),
        "broadcast": world.broadcast(f"from {world.rank}"),
        "threads": world.gather(torch.get_num_threads()),
        "pids": world.gather(os.getpid()),
    }


def broadcast_back(world: World, size: int) -> bool:
    array = np.arange(size) if world.rank == 0 else None
    received = world.broadcast(array)
    return all(world.gather(bool(np.array_equal(received, np.arange(size)))))


def fail_on(world: World, rank: int) -> None:
    if world.rank == rank:
        raise DataError(f"row 7 on rank {rank} has 3 columns, 4 expected")
    world.all_reduce_(torch.zeros(1))


def fail_strangely(world: World) -> None:
    class Local(Exception):
        """Does not pickle."""

    if world.rank == 1:
        raise Local("cannot travel")
    world.all_reduce_(torch.zeros(1))


def be_killed(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), 9)
    world.all_reduce_(torch.zeros(1))


def tell_pids_and_hang(world: World, folder: str) -> None:
    Path(folder, f"pid-{world.rank}").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


def deal(world: World, num: int) -> list[int]:
    return world.dealt(range(num)[world.rank :: world.size])
