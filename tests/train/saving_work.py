"""Saving beside training, as the tests run it on ranks and in processes that are killed."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel_work
import torch
from parallel_work import Weights, batches

from pensar.base.errors import RunError
from pensar.base.progress import Progress
from pensar.base.ranks import Crew, World
from pensar.train import sharded
from pensar.train.background import Background
from pensar.train.checkpoint import Saves
from pensar.train.layout import parse_layout
from pensar.train.loop import LoopConfig, Place, fit
from pensar.train.loss import LossConfig
from pensar.train.optimizer import OptimizerConfig
from pensar.train.parallel import saver
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.optimizer import ShardedOptimizer
from pensar.train.parallel.run import gathered_model, opened_mesh, spread_model
from pensar.train.parallel.shard import from_tensors
from pensar.train.parallel.step import Meshed
from pensar.train.step import train_step
from tiny import tiny_model

SLOW_SECONDS = 0.15
"""What a disk takes that is asked whether everything is on it."""


class Run:
    """A spread model with its optimiser and saves."""

    def __init__(self, world: World, mesh: Mesh, folder: Path) -> None:
        whole = tiny_model()
        self.mesh = mesh
        self.model = spread_model(whole.config, mesh, from_tensors(whole.state_dict()))
        self.optimizer = ShardedOptimizer(self.model, OptimizerConfig(), mesh)
        self.saves = Saves(folder, world, self.model, self.optimizer, {})

    def step(self, number: int) -> None:
        train_step(self.model, self.optimizer, batches(number, 4), 1.0, Meshed(self.mesh), LossConfig())

    def weights(self) -> Weights:
        gathered = gathered_model(self.model, self.mesh)
        return parallel_work.weights(gathered) if gathered is not None else {}


def going_on(world: World, folder: Path) -> dict[str, Any]:
    """What is there while rank 1 is still writing, after it has, and what is then loaded."""
    folder.mkdir(exist_ok=True)
    gate, write = threading.Event(), saver._write

    def late(*arguments: Any) -> Any:
        if world.rank == 1:
            gate.wait()
        return write(*arguments)

    with opened_mesh(world, parse_layout("shard=2")) as mesh:
        run = Run(world, mesh, folder)
        run.step(0)
        then = run.weights()
        saver._write = late
        try:
            run.saves.begin(1)
            run.step(1)
            run.saves.look()
            early = sharded.last(folder)
            gate.set()
            while world.broadcast(sharded.last(folder)) is None:
                run.saves.look()
        finally:
            saver._write = write
        later = run.weights()
        step = Run(world, mesh, folder)
        finished = step.saves.restore()
        loaded = step.weights()
    return {"early": early, "then": then, "later": later, "finished": finished, "loaded": loaded}


def failing(world: World, folder: Path) -> tuple[list[str], int]:
    """What every rank is told when rank 1's disk is full, and the last step that is there afterwards."""
    folder.mkdir(exist_ok=True)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with opened_mesh(world, parse_layout("shard=2")) as mesh:
        run = Run(world, mesh, folder)
        run.saves.begin(1)
        run.saves.restore()  # waits until it is written
        write, said = saver.FileSystemWriter.write_data, ""
        if world.rank == 1:
            saver.FileSystemWriter.write_data = full  # type: ignore[method-assign]
        try:
            run.saves.begin(2)
            while True:
                run.saves.look()
        except RunError as error:
            said = str(error)
        finally:
            saver.FileSystemWriter.write_data = write  # type: ignore[method-assign]
        return world.gather(said), Run(world, mesh, folder).saves.restore()


def bytes_of_copies(world: World, layout: str, folder: Path) -> int:
    """What the copies of all ranks take."""
    folder.mkdir(exist_ok=True)
    with opened_mesh(world, parse_layout(layout)) as mesh:
        run, background = Run(world, mesh, folder), Background(world)
        saver.Saver(run.model, run.optimizer).begin(folder, 1, {}, background)
        background.wait()
        return sum(world.gather(background.copies.num_bytes))


def beside(world: World, fails: int) -> tuple[list[int], list[str]]:
    """Work of every rank and what rank 0 makes of it; what each was told where rank `fails` cannot do its own."""
    made: list[int] = []

    def work() -> int:
        if world.rank == fails:
            raise ValueError("bad luck")
        return 10 + world.rank

    background, said = Background(world), ""
    try:
        with background:
            background.start(work, made.extend)
            background.start(work, made.extend)
    except RunError as error:
        said = str(error)
    return made, world.gather(said)


def trained(world: World, layout: str, folder: Path) -> None:
    """Ten steps, a checkpoint after every second; the weights at the end are beside the checkpoints."""
    config = LoopConfig(steps=10, checkpoint_every=2)

    def run(place: Place, model: Any) -> None:
        fit(model, lambda step: batches(step, rows=4), config, place, name="test")

    def place(mesh: Mesh | None = None) -> Place:
        return Place(folder, folder.with_name(folder.name + "-logs"), world, Progress(), mesh)

    whole = tiny_model()
    if not layout:
        run(place(), whole)
        torch.save(parallel_work.weights(whole), folder / "weights.pt")
        return
    with opened_mesh(world, parse_layout(layout)) as mesh:
        spread = spread_model(whole.config, mesh, from_tensors(whole.state_dict()))
        run(place(mesh), spread)
        gathered = gathered_model(spread, mesh)
        if gathered is not None:
            torch.save(parallel_work.weights(gathered), folder / "weights.pt")


def slowly(fsync: Callable[[int], None]) -> Callable[[int], None]:
    """A disk that takes its time."""

    def slow(file: int) -> None:
        time.sleep(SLOW_SECONDS)
        fsync(file)

    return slow


def main(layout: str, folder: Path) -> None:
    os.fsync = slowly(os.fsync)
    ranks = parse_layout(layout).ranks if layout else 1
    with Crew(ranks=ranks, threads=1) as crew:
        crew.call(trained, layout, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
