"""Opening a mesh for a stage: the process group, the sharded model, and the way back to a whole one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pensar.base.errors import ConfigError
from pensar.base.ranks import World
from pensar.model import hardware
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3
from pensar.train.layout import Layout
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.parts import whole_of
from pensar.train.parallel.shard import Source, shard


@contextmanager
def opened_mesh(world: World, layout: Layout) -> Iterator[Mesh]:
    """The ranks of `world` in their layout; torch's default process group is made and ended where there is none.

    Every rank takes the accelerator of its number on this machine (torchrun's LOCAL_RANK), or the processor.
    """
    if world.size != layout.ranks:
        raise ConfigError(
            f"the layout {layout} is of {layout.ranks} ranks and the run has {world.size}; "
            f"give --ranks {layout.ranks}, or torchrun as many processes"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", world.rank)) % torch.cuda.device_count()
        )
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield Mesh(layout, device)
        return
    # All ranks of a crew are on this machine; its own name need not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="pensar-mesh-") as folder:
        path = world.broadcast(f"{folder}/store")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(path, world.size)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        try:
            yield Mesh(layout, device, tag="_" + Path(path).parent.name)
            world.barrier()
        finally:
            dist.destroy_process_group()


def spread_model(config: ModelConfig, mesh: Mesh, source: Source, precision: str = "auto") -> Qwen3:
    """This rank's part of a model, in training mode; on an accelerator that has bfloat16 it computes in it, unless
    `precision` is float32."""
    with torch.device("meta"):
        empty = Qwen3(config)
    fast = precision != "float32" and hardware.capability(mesh.device) >= hardware.AMPERE
    return shard(empty, mesh, source, torch.bfloat16 if fast else None).train()


def gathered_model(model: Qwen3, mesh: Mesh) -> Qwen3 | None:
    """The whole model on rank 0's processor; None on the others, all of which must take part."""
    state = {}
    for name, parameter in model.named_parameters():
        whole = whole_of(parameter)
        if mesh.stage.rank == 0:
            state[name] = whole.cpu()
    if mesh.layout.pp > 1:
        state = {name: part for parts in mesh.world.gather(state) for name, part in parts.items()}
    if mesh.world.rank != 0:
        return None
    with torch.device("meta"):
        full = Qwen3(model.config)
    full.load_state_dict(state, assign=True)
    return full.eval()
