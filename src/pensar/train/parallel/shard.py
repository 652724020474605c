"""Sharding: a model on the meta device becomes this rank's part of it, and its weights are filled in by name.

The order is that of torch's own building blocks: tensor parallel, expert parallel, then FSDP2 a block at a time.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from pensar.model.config import ModelConfig
from pensar.model.moe import SparseMLP
from pensar.model.qwen3 import Block, Qwen3, initial_values
from pensar.train.parallel.depth import cut_depth, parts_of
from pensar.train.parallel.expert import split_experts
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.parts import Window, local_of, window_of
from pensar.train.parallel.tensor import split_tensors

Source = Callable[[str, Window], Tensor]
"""Parameter's name and window -> its values there."""


def shard(model: Qwen3, mesh: Mesh, source: Source, precision: torch.dtype | None = None) -> Qwen3:
    """Cuts a model that was built on the meta device to this rank's part and fills it from `source`.

    `precision` is the type of forward and backward (bfloat16 on accelerators); weights, gradients' sums and optimiser
    stay float32. Gradients are sums over the ranks, not means: the loss is divided by the step's weight already.
    """
    cut(model, mesh, precision)
    return fill(model, mesh, source)


def cut(model: Qwen3, mesh: Mesh, precision: torch.dtype | None) -> None:
    """The first half of `shard`: the model is this rank's part of it, still without values."""
    if mesh.layout.pp > 1:
        cut_depth(model, mesh)
    sparse = [block.mlp for block in _blocks(model) if isinstance(block.mlp, SparseMLP)]
    if mesh.layout.tp > 1:
        split_tensors(model, mesh.heads)
    if mesh.layout.ep > 1:
        for mlp in sparse:
            _cut_experts(mlp.experts, mesh)
            split_experts(mlp.experts, mesh.experts.get_group())
    _shard_weights(model, mesh, MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32))


def fill(model: Qwen3, mesh: Mesh, source: Source) -> Qwen3:
    """The other half: every parameter gets its values on the mesh's device."""
    model.to_empty(device=mesh.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local_of(parameter).copy_(source(name, window_of(parameter)))
    return model


def from_tensors(state: dict[str, Tensor]) -> Source:
    """The weights of a state that every rank has whole."""
    return lambda name, window: state[name][window]


def from_seed(config: ModelConfig, seed: int) -> Source:
    """The initial weights: those of `initialize` on one rank, whatever the layout; drawn one whole tensor at a time."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Qwen3(config).named_parameters()}
    return lambda name, window: initial_values(name, shapes[name], config, seed)[window]


def _blocks(model: Qwen3) -> Iterator[Block]:
    for block in model.model.layers:
        assert isinstance(block, Block)
        yield block


def _cut_experts(experts: nn.Module, mesh: Mesh) -> None:
    for name, parameter in list(experts.named_parameters()):
        cut = distribute_tensor(parameter, mesh.experts, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(cut))


def _shard_weights(model: Qwen3, mesh: Mesh, precision: MixedPrecisionPolicy) -> None:
    shards = mesh.layout.dp_shard * mesh.layout.cp * mesh.layout.tp // mesh.layout.ep

    def placement(parameter: nn.Parameter) -> Shard:
        """Along the width where a rank has fewer experts than they are spread over."""
        return Shard(0 if local_of(parameter).shape[0] >= shards else 1)

    for block in _blocks(model):
        if mesh.layout.ep * mesh.layout.tp > 1 and isinstance(block.mlp, SparseMLP):
            fully_shard(
                block.mlp.experts, mesh=mesh.expert_weights, mp_policy=precision, shard_placement_fn=placement
            )
        fully_shard(block, mesh=mesh.weights, mp_policy=precision)
    whole: list[nn.Module] = [model] if mesh.layout.pp == 1 else [*parts_of(model)]
    for root in whole:
        fully_shard(root, mesh=mesh.weights, mp_policy=precision)
    for module in chain.from_iterable(root.modules() for root in whole):
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
