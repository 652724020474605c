"""Weight sync: new weights of the same names and shapes in place of a model's own, from memory or from another rank."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pensar.base.errors import ModelError
from pensar.base.ranks import World
from pensar.model.qwen3 import Qwen3


def checked_weights(model: Qwen3, weights: Mapping[str, Tensor] | Qwen3) -> Mapping[str, Tensor]:
    """`weights` by name; ModelError where names or shapes are not those of `model`."""
    new = dict(weights.named_parameters()) if isinstance(weights, Qwen3) else weights
    own = dict(model.named_parameters())
    if new.keys() != own.keys():
        odd = sorted(new.keys() ^ own.keys())
        raise ModelError(f"the new weights differ from the model in {len(odd)} names, such as {odd[0]}")
    for name, parameter in own.items():
        if new[name].shape != parameter.shape:
            raise ModelError(
                f"{name} has shape {list(new[name].shape)} in the new weights and {list(parameter.shape)} in the "
                "model; an engine keeps one shape, make a new one"
            )
    return new


def weights_stamp(model: Qwen3) -> int:
    """A number that changes when any weight is changed in place, by an optimiser's step for instance."""
    return sum(parameter._version for parameter in model.parameters())  # noqa: SLF001 - torch has no public name


@torch.no_grad()
def replace_weights(model: Qwen3, weights: Mapping[str, Tensor] | Qwen3) -> None:
    """Copies `weights` into the model, also from another device or type; ModelError before anything is changed."""
    new = checked_weights(model, weights)
    for name, parameter in model.named_parameters():
        if new[name].data_ptr() != parameter.data_ptr():
            parameter.copy_(new[name])


BUCKET_BYTES = 2**26
"""Of one message: a few large ones are as fast as the wire, and another copy of the weights is never held."""


@torch.no_grad()
def broadcast_weights(model: Qwen3, world: World, source: int = 0) -> None:
    """Gives all ranks the weights of rank `source`, in place; every rank makes the call.

    The process group may be of gloo or, with gloo for what is on a CPU, of NCCL. Names, shapes and types are compared
    first: ModelError on every rank where one's differ.
    """
    if world.size == 1:
        return
    named = sorted(model.named_parameters())
    mine = [(name, tuple(parameter.shape), str(parameter.dtype)) for name, parameter in named]
    all_of = world.gather(mine)
    for rank, theirs in enumerate(all_of):
        if theirs != all_of[source]:
            odd = min(set(theirs) ^ set(all_of[source]))
            raise ModelError(
                f"rank {rank} has another model than rank {source}, which sends its weights: {odd[0]} "
                f"{list(odd[1])} in {odd[2]} is in one of them alone; open the same model on all ranks"
            )
    for bucket in _buckets([parameter for _, parameter in named]):
        flat = torch.cat([parameter.reshape(-1) for parameter in bucket])
        world.group.broadcast(flat, source).wait()
        if world.rank != source:
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, values in zip(bucket, parts, strict=True):
                parameter.copy_(values.view_as(parameter))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one type, as many as a message takes."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.nbytes > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
