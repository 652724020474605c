"""Torchrun: a crew whose processes torchrun started, on one machine or on many.

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m pensar run RECIPE

Rank 0 runs the command; the others serve its calls until it is done. When a rank dies torchrun ends the others and,
with --max-restarts, starts all again: the run goes on from its last checkpoint. The run's folder must be one that all
machines see.
"""

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, cast

from pensar.base.ranks import PATIENCE, Crew, T, World
from pensar.base.usage import ResourceUse, reset_peak, usage_now

JOINING = datetime.timedelta(minutes=5)
"""How long to wait for the agent."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_follower() -> bool:
    """Whether this process serves the calls of another."""
    return launched() and os.environ["RANK"] != "0"


class TorchrunCrew(Crew):
    """The crew as rank 0 sees it; how many ranks there are is torchrun's to say."""

    def __init__(self, threads: int = 1) -> None:
        super().__init__(ranks=int(os.environ["WORLD_SIZE"]), threads=threads)
        self._world = _join()

    def call(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(world, *args)` on every rank; the result of rank 0. A failure elsewhere ends this process too."""
        _set_threads(self.threads)
        self._world.broadcast((fn, args, self.threads))
        return fn(self._world, *args)

    def usage(self) -> dict[int, ResourceUse]:
        """CPU-seconds and peak memory by rank."""
        return dict(enumerate(self.call(_usages)))

    def reset_peaks(self) -> None:
        self.call(_reset)

    def close(self) -> None:
        """Nothing: `release` lets the other ranks go when the command is done."""


def follow() -> int:
    """Serves rank 0 until it lets this process go; the exit code."""
    import torch.distributed as dist

    sys.stdout = sys.stderr
    world = _join()
    while True:
        message: tuple[Callable[..., Any], tuple[Any, ...], int] | None = world.broadcast(cast(Any, None))
        if message is None:
            dist.destroy_process_group()
            return 0
        fn, args, threads = message
        _set_threads(threads)
        try:
            fn(world, *args)
        except BaseException:  # noqa: BLE001 - whatever it is, torchrun must end the ranks that wait for this one
            traceback.print_exc()
            leave(1)


def release() -> None:
    """Lets the other ranks go; rank 0 calls it once, at its end."""
    import torch.distributed as dist

    _join().broadcast(None)
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends this process at once: an orderly end would wait for threads that wait for ranks that are no more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join() -> World:
    """The world of torchrun's processes; waits until all have come."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # The agent's store outlives its workers: under a name of its own each life finds no addresses of the dead.
        life = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['WORLD_SIZE']}"
        agent = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=JOINING
        )
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(life, agent),  # type: ignore[attr-defined]
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=PATIENCE,
        )
    return World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _usages(world: World) -> list[ResourceUse]:
    return world.gather(usage_now())


def _reset(world: World) -> None:
    reset_peak()
    world.barrier()
