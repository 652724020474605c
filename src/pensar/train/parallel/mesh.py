"""Mesh: the ranks of a run in their layout, and the groups of them that share one kind of work.

The order of the dimensions, from slow to fast, is pipeline, replicas, shards, context, tensor, so that the ranks that
talk most are neighbours, on one machine where there are several.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pensar.base.errors import ConfigError
from pensar.base.ranks import World
from pensar.train.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the layout. Needs torch's default process group, of `layout.ranks` ranks."""

    layout: Layout
    device: torch.device
    tag: str = ""
    """Tells this mesh from earlier ones of the process: torch remembers plans by the names of a mesh, and with them
    groups that have ended."""

    def __post_init__(self) -> None:
        size = dist.get_world_size()
        if size != self.layout.ranks:
            raise ConfigError(
                f"the layout {self.layout} is of {self.layout.ranks} ranks and the run has {size}"
            )

    @cached_property
    def dims(self) -> DeviceMesh:
        """All ranks as weights see them: pp, replicate, shard, tp; those that split a context are shards too."""
        layout = self.layout
        shape = (layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp)
        return self._arranged(shape, "pp", "replicate", "shard", "tp")

    @cached_property
    def token_dims(self) -> DeviceMesh:
        """The same ranks as tokens see them: pp, replicate, shard, cp, tp."""
        layout = self.layout
        shape = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
        return self._arranged(shape, "pp", "replicate", "shard", "cp", "tp")

    @cached_property
    def expert_dims(self) -> DeviceMesh:
        """The same ranks as the experts see them: pp, replicate, those that share an expert's weights, ep."""
        layout = self.layout
        within = layout.dp_shard * layout.cp * layout.tp
        shape = (layout.pp, layout.dp_replicate, within // layout.ep, layout.ep)
        return self._arranged(shape, "pp", "replicate", "expert_shard", "ep")

    @cached_property
    def weights(self) -> DeviceMesh:
        """The ranks that share the weights: (replicas, shards) where there are replicas, else shards."""
        return self._part(self.dims, *(("replicate",) if self.layout.dp_replicate > 1 else ()), "shard")

    @cached_property
    def expert_weights(self) -> DeviceMesh:
        """The ranks that share the weights of one rank's experts."""
        replicas = ("replicate",) if self.layout.dp_replicate > 1 else ()
        return self._part(self.expert_dims, *replicas, "expert_shard")

    @cached_property
    def heads(self) -> DeviceMesh:
        """The ranks that split heads, MLP columns and vocabulary."""
        return self._part(self.dims, "tp")

    @cached_property
    def experts(self) -> DeviceMesh:
        """The ranks that split a layer's experts."""
        return self._part(self.expert_dims, "ep")

    @cached_property
    def world(self) -> World:
        """Every rank."""
        group = dist.group.WORLD
        return World(dist.get_rank(), dist.get_world_size(), group)

    @cached_property
    def data(self) -> World:
        """The ranks over which a step's rows are dealt out: they see different rows, of one part of the model."""
        return self._joined("replicate", "shard", name="data")

    @cached_property
    def tokens(self) -> World:
        """The ranks over which a step's tokens are spread: those of `data` and those that split a context.

        In a pipeline they are spread over the last rank of each alone, and the others count none.
        """
        return self._joined("pp", "replicate", "shard", "cp", name="tokens")

    @cached_property
    def context(self) -> World:
        return self._of(self._part(self.token_dims, "cp"))

    @cached_property
    def depth(self) -> World:
        """The ranks that hold one part each of the depth."""
        return self._of(self._part(self.dims, "pp"))

    @cached_property
    def stage(self) -> World:
        """The ranks that hold this rank's part of the depth, in pieces or in copies."""
        return self._joined("replicate", "shard", "cp", "tp", name="stage")

    @cached_property
    def ends(self) -> World | None:
        """The two ends of this rank's pipeline; None between them. Every rank must ask at the same time."""
        mine = None
        pipelines = self.dims.mesh.flatten(1).T.tolist()
        for ranks in pipelines:
            pair = [ranks[0], ranks[-1]]
            group = dist.new_group(pair)
            if dist.get_rank() in pair:
                mine = World(pair.index(dist.get_rank()), 2, group)
        return mine

    def _joined(self, *names: str, name: str) -> World:
        part = self._part(self.token_dims, *names)
        return self._of(part._flatten(name + self.tag))  # noqa: SLF001 - the only way to join dimensions

    def _arranged(self, shape: tuple[int, ...], *names: str) -> DeviceMesh:
        tagged = tuple(name + self.tag for name in names)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=tagged)

    def _part(self, mesh: DeviceMesh, *names: str) -> DeviceMesh:
        return mesh[tuple(name + self.tag for name in names)]

    @staticmethod
    def _of(mesh: DeviceMesh) -> World:
        return World(mesh.get_local_rank(), mesh.size(), mesh.get_group())
