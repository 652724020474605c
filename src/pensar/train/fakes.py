"""Fakes: tensors of which only shapes are computed, so that one machine can run a step of a model that it cannot hold.

What a program decides by must be there: token ids, positions, masks and counts stay real, since nothing real depends on
a fake. Where it asks after a fake value, it gets what a step at balance would give.
"""
# ruff: noqa: SLF001 - operators of the library have such names

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
FEW = 1 << 16
"""Values of a sum over experts and layers, at most; weights and activations have more."""


class Balanced(TorchDispatchMode):
    """To be entered within a `FakeTensorMode` that takes real tensors too.

    Numbers that are read from fakes are 1; every expert gets as many tokens as any other, and every rank of an
    exchange sends what it receives.
    """

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(is_traceable_wrapper_subclass(tensor) for tensor in given):
            return NotImplemented  # it comes again with the tensors inside
        if not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in given):
            if given or _decides(op, args, kwargs):
                with unset_fake_temporarily():
                    return _really(op, args, kwargs)
            return op(*args, **kwargs)
        if op is aten._local_scalar_dense.default:
            return _one(args[0].dtype)
        if op is aten.bincount.default:
            return _even(args[0].numel(), kwargs.get("minlength", args[2] if len(args) > 2 else 0))
        if op is aten._grouped_mm.default and args[0].dtype == torch.float32:
            # The library knows the shapes of its kernel's results in bfloat16 only.
            narrow = [tensor.bfloat16() for tensor in args[:2]]
            return op(*narrow, *args[2:], **kwargs).float()
        if op is aten.index.Tensor:
            return op(args[0], tree_map(_positions, args[1]))
        return op(*args, **kwargs)


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def _decides(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation without tensors makes what programs decide by: whole numbers, and sums that begin at 0."""
    if op is aten.zeros.default and math.prod(args[0]) <= FEW:
        return True
    dtype = kwargs.get("dtype")
    if dtype is None:
        return op is aten.arange.default or op is aten.arange.start
    return not (dtype.is_floating_point or dtype.is_complex)


def _really(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = op(*args, **kwargs)
    if op.name() == "c10d::alltoall_base_":
        args[0].copy_(args[1])
    return out


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _even(total: int, parts: int) -> Tensor:
    with unset_fake_temporarily():
        each, more = divmod(total, parts)
        return each + (torch.arange(parts) < more).long()


def _positions(index: Any) -> Any:
    """A mask's positions: the size of what is chosen by one must be known."""
    real = isinstance(index, Tensor) and not isinstance(index, FakeTensor)
    if not real or index.dtype != torch.bool:
        return index
    with unset_fake_temporarily():
        (found,) = index.nonzero(as_tuple=True)  # of one dimension
    return found
