"""Weight sync, as the tests run it on ranks."""

from typing import Any

import torch

from pensar.base.errors import ModelError
from pensar.base.ranks import World
from pensar.infer import sync
from pensar.infer.engine import Engine, Request, SamplingParams
from tiny import tiny_model

PROMPT = list(range(1, 20))


def received(world: World, bucket_bytes: int) -> list[Any]:
    """Every rank's greedy tokens, half of them from its own weights, half from those of rank 1."""
    sync.BUCKET_BYTES = bucket_bytes
    model = tiny_model(seed=world.rank)
    engine = Engine(model)
    engine.submit(Request("a", PROMPT, SamplingParams(max_tokens=8)))
    tokens = [token for _ in range(4) for piece in engine.step() for token in piece.tokens]
    engine.receive(world, source=1)
    pieces = [piece for _ in range(4) for piece in engine.step()]
    tokens += [token for piece in pieces for token in piece.tokens]
    same = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return world.gather((tokens, {piece.version for piece in pieces}, same))


def refused(world: World) -> list[str]:
    """What every rank says to models that differ."""
    model = tiny_model()
    if world.rank == 1:
        model.to(torch.bfloat16)
    try:
        sync.broadcast_weights(model, world)
    except ModelError as error:
        return world.gather(str(error))
    return world.gather("")
