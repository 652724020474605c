"""A small pipeline of pure Python stages that write shards and go on from them, also as a process of its own.

`python pipeline_work.py ROOT SOURCE [SECONDS]` runs it; a shard takes SECONDS.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pensar.base.config import Config
from pensar.base.files import write_atomic
from pensar.base.metrics import Metrics
from pensar.base.pipeline import ALL, Choice, Outcome, run
from pensar.base.stage import Counts, Runtime, Stage

LOG = logging.getLogger("pensar.test")
SHARDS = 4


class ShardConfig(Config):
    factor: int = 2
    note: str = ""


class TrainConfig(Config):
    lr: float = 0.003
    steps: int = 12


@dataclass(frozen=True, kw_only=True)
class Slow(Runtime):
    """A shard or step takes so many seconds."""

    seconds: float


def read_source(config: ShardConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    numbers = [int(word) for word in Path(config.note).read_text().split()]
    write_atomic(out / "numbers.json", json.dumps(numbers))
    return {"numbers": len(numbers)}


def write_shards(config: ShardConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    numbers = json.loads((inputs["source"] / "numbers.json").read_text())
    with runtime.progress.track("shards", SHARDS, unit="shard") as track:
        for index in range(SHARDS):
            shard = out / "shards" / f"{index}.txt"
            if not shard.exists():
                pause(runtime)
                write_atomic(shard, "\n".join(str(n * config.factor) for n in numbers[index::SHARDS]))
                LOG.info("wrote shard %d", index)
            track.advance()
    return {"shards": SHARDS, "numbers": len(numbers)}


def train(config: TrainConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Sums shards step by step, with a checkpoint every third step."""
    shards = [path.read_text().split() for path in sorted((inputs["shards"] / "shards").iterdir())]
    checkpoint = out / "checkpoint.json"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "weight": 0.0}
    with Metrics(out, runtime.logs) as metrics:
        metrics.rewind(state["step"])
        for step in range(state["step"] + 1, config.steps + 1):
            pause(runtime)
            gradient = sum(map(int, shards[step % SHARDS]))
            state = {"step": step, "weight": state["weight"] + config.lr * gradient}
            metrics.log(step, weight=state["weight"])
            metrics.timing(step, seconds=time.perf_counter())
            if step % 3 == 0:
                write_atomic(checkpoint, json.dumps(state))
    return {"steps": config.steps}


def pause(runtime: Runtime) -> None:
    if isinstance(runtime, Slow):
        time.sleep(runtime.seconds)


def stages(source: Path, **changes: Any) -> list[Stage]:
    """source -> shards -> train, and source -> other; `changes` are by stage name: configurations or revisions."""
    recipe = [
        Stage("source", read_source, ShardConfig(note=str(source)), outside=(source,)),
        Stage("shards", write_shards, ShardConfig(), {"source": "source"}),
        Stage("other", write_shards, ShardConfig(factor=5), {"source": "source"}),
        Stage("train", train, TrainConfig(), {"shards": "shards"}),
    ]
    return [
        Stage(
            stage.name,
            stage.run,
            changes.get(stage.name, stage.config),
            stage.inputs,
            stage.outside,
            changes.get(f"{stage.name}_revision", stage.revision),
        )
        for stage in recipe
    ]


def go(recipe: Sequence[Stage], root: Path, choice: Choice = ALL, seconds: float = 0.0) -> list[Outcome]:
    runtime = Slow(logs=root / "logs", seconds=seconds)
    return run(recipe, root, runtime, choice, links={"model": "train"})


if __name__ == "__main__":
    go(stages(Path(sys.argv[2])), Path(sys.argv[1]), seconds=float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
