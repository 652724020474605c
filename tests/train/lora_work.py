"""A stage with LoRA that the tests run on one rank and on several; workers must be able to import it."""

from pathlib import Path

import numpy as np
import torch

from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.model.lora import merged
from pensar.text.packing import Batch
from pensar.train.loop import LoopConfig, Place, fit
from tiny import parameters_of, tiny_model


def counting(step: int) -> list[Batch]:
    """Rows that count upwards, each from a number of its own: something to learn."""
    rng = np.random.default_rng(step)
    tokens = ((rng.integers(0, 40, (6, 1)) + np.arange(20)) % 40 + 100).astype(np.int32)
    positions = np.broadcast_to(np.arange(20, dtype=np.int32), tokens.shape).copy()
    ones = np.ones_like(tokens)
    return [Batch(tokens=tokens, positions=positions, segments=ones, ce=ones.astype(np.float32))]


def place_of(out: Path, world: World | None = None) -> Place:
    out.mkdir(exist_ok=True)
    return Place(out, out.with_name(f"{out.name}-logs"), world or World(), Progress())


def merged_weights(world: World, config: LoopConfig, out: Path) -> torch.Tensor:
    """The parameters of the merged model after a whole stage, the same on all ranks."""
    model = tiny_model()
    fit(model, counting, config, place_of(out, world), name="counting", seed=5)
    vectors = world.gather(parameters_of(merged(model)).numpy())
    assert all((vector == vectors[0]).all() for vector in vectors), "ranks have drifted apart"
    return torch.from_numpy(vectors[0])
