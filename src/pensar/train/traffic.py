"""Traffic: what the ranks of a layout send each other in a step, by collective, and how long the links take for it.

Ranks are numbered as the mesh numbers them: tensor ranks are neighbours, then context, shards, replicas, pipeline;
expert ranks are neighbours too. A node holds consecutive ranks. Rings (gather, scatter, sum) move (n - 1) / n of their
bytes over the narrowest place on the way, which between nodes is the network of all members that the node holds. In an
exchange of all with all, every rank sends what is not for its node through its own share of the network.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pensar.model.config import ModelConfig
from pensar.train.accelerators import Accelerator
from pensar.train.footprint import STORED, Share, Step, share, whole_experts
from pensar.train.layout import Layout

LINK_SHARE = 0.8
"""Of the vendors' figures that large collectives reach."""


class Traffic(NamedTuple):
    """One kind of exchange of one rank, over a forward and backward pass (`weights`, `tokens`) or a step (`step`)."""

    name: str
    kind: str
    """`weights` can run beside computing, `tokens` cannot, `step` happens once an update."""
    num_bytes: float
    """That the collective makes of one rank's memory: results of gathers, inputs of scatters, sums and exchanges."""
    seconds: float


class Group(NamedTuple):
    """The ranks of one collective: how many, and how many of them a node holds."""

    size: int
    local: int

    @classmethod
    def of(cls, size: int, stride: int, gpus_per_node: int) -> "Group":
        """Of `size` ranks, `stride` apart."""
        return cls(size, max(1, min(size, gpus_per_node // stride)))

    def ring(self, num_bytes: float, gpu: Accelerator) -> float:
        """Seconds of a gather to, or a scatter of, so many bytes."""
        rate = gpu.link_bytes_per_second
        if self.local < self.size:
            rate = min(rate, self.local * gpu.network_bytes_per_second)
        return num_bytes * (self.size - 1) / self.size / (LINK_SHARE * rate)

    def exchange(self, num_bytes: float, gpu: Accelerator) -> float:
        """Seconds of sending a part of so many bytes to every rank."""
        within = num_bytes * (self.local - 1) / self.size / gpu.link_bytes_per_second
        between = num_bytes * (self.size - self.local) / self.size / gpu.network_bytes_per_second
        return max(within, between) / LINK_SHARE


def traffic(
    model: ModelConfig, layout: Layout, step: Step, gpu: Accelerator, stage: int = 0
) -> list[Traffic]:
    """Every kind of exchange that the layout needs, for one part of the depth."""
    part = share(model, layout, stage)
    found = [
        *_weights(layout, step, gpu, part),
        *_tokens(model, layout, step, gpu, part, stage),
        *_update(model, layout, step, gpu, part),
    ]
    return [one for one in found if one.num_bytes]


def _weights(layout: Layout, step: Step, gpu: Accelerator, part: Share) -> Iterator[Traffic]:
    """Blocks are gathered for forward and again for backward, both ends once; gradients are summed in float32."""
    c, node, shards = step.compute_bytes, gpu.gpus_per_node, layout.dp_shard * layout.cp
    dense, experts = part.layers * part.block, part.layers * part.experts
    among = Group.of(shards, layout.tp, node)
    of_experts = Group.of(shards * layout.tp // layout.ep, layout.ep, node)
    replicas = Group.of(layout.dp_replicate, shards * layout.tp, node)
    counting = _counting(layout, step, part.experts)
    passes, a_step, both_ends = 2.0 + counting, 1.0, 1.0
    if layout.pp > 1:
        # Backward passes leave blocks gathered for the next micro-batch; gradients are summed after the last one.
        a_step = 1 / layout.micro_batches
        passes, both_ends = 1 + a_step + counting, (1 + counting) * a_step
    gathered = [(among, c * (passes * dense + both_ends * part.ends)), (of_experts, c * passes * experts)]
    scattered = [(among, STORED * a_step * (dense + part.ends)), (of_experts, STORED * a_step * experts)]
    for name, moved in (("all-gather of weights", gathered), ("reduce-scatter of gradients", scattered)):
        real = [(group, num_bytes) for group, num_bytes in moved if group.size > 1 and num_bytes]
        seconds = sum(group.ring(num_bytes, gpu) for group, num_bytes in real)
        yield Traffic(name, "weights", sum(num_bytes for _, num_bytes in real), seconds)
    if layout.dp_replicate > 1:
        own = STORED * a_step * ((dense + part.ends) / shards + experts / of_experts.size)
        yield Traffic("all-reduce over replicas", "weights", own, 2 * replicas.ring(own, gpu))


def _tokens(
    model: ModelConfig, layout: Layout, step: Step, gpu: Accelerator, part: Share, stage: int
) -> Iterator[Traffic]:
    """What moves with the tokens, and must be there before computing goes on."""
    c, D, t, node = step.compute_bytes, model.hidden_size, step.tokens(layout), gpu.gpus_per_node
    again, counting = layout.recompute == "full", _counting(layout, step, part.experts)
    if layout.ep > 1:
        # To the experts and back, each way in forward and in backward; whole blocks go through the first two twice.
        times = 4 + 2 * again + 2 * counting
        sent = part.layers * times * c * t / layout.tp * model.experts_per_token * D
        yield Traffic(
            "all-to-all of tokens", "tokens", sent, Group.of(layout.ep, 1, node).exchange(sent, gpu)
        )
    if layout.cp > 1:
        row = 2 * c * model.num_kv_heads / layout.tp * model.head_dim * t * layout.cp
        moved = part.layers * row * (2 + (layout.recompute != "none") + counting)
        group = Group.of(layout.cp, layout.tp, node)
        yield Traffic("all-gather of keys and values", "tokens", moved, group.ring(moved, gpu))
    if layout.tp > 1:
        # Into and out of both halves of a block, of a sparse one the first alone, and the same for the gradients.
        # What is computed again need not leave the block.
        times = 4 + 2 * again + 2 * counting if part.experts else 8 + again + 2 * (layout.recompute != "none")
        moved = part.layers * c * t * D * times
        moved += 2 * c * t * (model.vocab_size if part.head else D)
        group = Group.of(layout.tp, 1, node)
        yield Traffic("gathers and scatters of the stream", "tokens", moved, group.ring(moved, gpu))
    if layout.pp > 1:
        neighbours = (stage > 0) + (stage < layout.pp - 1)
        moved = (2.0 + counting) * neighbours * c * t / layout.tp * D
        group = Group.of(layout.pp, layout.ranks // layout.pp, node)
        yield Traffic("stream between parts of the depth", "tokens", moved, group.exchange(moved * 2, gpu))


def _update(
    model: ModelConfig, layout: Layout, step: Step, gpu: Accelerator, part: Share
) -> Iterator[Traffic]:
    """Every rank sends its parts of the matrices that are cut to their owners, and gets the updates back."""
    ranks = layout.ranks // layout.pp
    if not step.muon or ranks == 1:
        return
    matrices = part.layers * (part.block * layout.tp + part.experts * layout.ep)
    if whole_experts(model, layout):
        matrices -= part.layers * part.experts * layout.ep
    moved = 2.0 * STORED * matrices / ranks
    group = Group.of(ranks, 1, gpu.gpus_per_node)
    yield Traffic("matrices for Muon", "step", moved, group.exchange(moved, gpu))


def _counting(layout: Layout, step: Step, experts: int) -> int:
    """Passes for the experts' shares before the others: one or none; pipelines always count."""
    return int(experts > 0 and (layout.pp > 1 or (step.exact_balance and step.accumulate > 1)))
