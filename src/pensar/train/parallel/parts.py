"""Parts: what one rank holds of a tensor that is spread over many."""

import itertools

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset,
    compute_local_shape_and_global_offset,
)

Window = tuple[slice, ...]
"""The part of a whole tensor that one rank holds."""


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local` as this rank's part of a tensor that is spread like `parameter`."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def window_of(parameter: Tensor) -> Window:
    """Where this rank's part lies in the whole."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def windows_of(parameter: Tensor) -> dict[int, Window]:
    """The same for every rank that shares the parameter, by its number among all ranks."""
    assert isinstance(parameter, DTensor)
    mesh, found = parameter.device_mesh, {}
    coordinates = itertools.product(*(range(size) for size in mesh.shape))
    for coordinate, number in zip(coordinates, mesh.mesh.flatten().tolist(), strict=True):
        shape, offset = _compute_local_shape_and_global_offset(
            parameter.shape, mesh.shape, list(coordinate), parameter.placements
        )
        window = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        found[number] = window
    return found


def whole_of(parameter: Tensor) -> Tensor:
    """The whole tensor, gathered on every rank that holds a part."""
    detached = parameter.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def copies_of(parameter: Tensor, ranks: int) -> int:
    """How many of the `ranks` that share a parameter hold the same part of it."""
    if not isinstance(parameter, DTensor):
        return ranks
    parts = 1
    for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
        parts *= 1 if isinstance(placement, Replicate) else size
    return ranks // parts
