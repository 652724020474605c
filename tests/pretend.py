"""A pretended CUDA device: tensors that say they lie on it and are computed on the processor.

Within `Pretend`, `device="cuda"` makes such tensors. An operation that mixes them with the processor's own raises as a
real device would, so that a whole step of training can be looked through for tensors in the wrong place, with numbers
to compare. The library's flash kernel, which no processor has, is computed by hand from its contract.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pensar.model import hardware

CUDA = torch.device("cuda", 0)
FACTORIES = ("arange", "empty", "full", "ones", "randn", "tensor", "zeros")
MAY_MIX = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::copy_"}
"""What takes the processor's tensors beside a device's: indices, and copies between the two."""


class Far(Tensor):
    """A tensor on the pretended device; `near` is what it is."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        shell = torch.empty_strided(near.shape, near.stride(), dtype=near.dtype, device="meta")
        far: Far = torch.Tensor._make_subclass(cls, shell, False)
        return far

    def __init__(self, near: Tensor) -> None:
        self.near = near

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.near!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})


active: list["Pretend"] = []


def dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the processor, for tensors that all lie on the pretended device."""
    name = function.name()
    if active:
        active[-1].called[name] += 1
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for tensor in given:
        assert isinstance(tensor, Far) or tensor.device.type != "meta", f"{name}: a value was lost on the way"
        strange = not isinstance(tensor, Far) and tensor.dim() > 0
        assert not strange or name.split(".")[0] in MAY_MIX or name in MAY_MIX, (
            f"{name}: a tensor {tuple(tensor.shape)} is on the processor, another on cuda"
        )
    assert not name.startswith("pensar::"), f"{name} is an operation of processors alone"
    if active and name in active[-1].kernels:
        function = active[-1].kernels[name]
    to_processor = name == "aten::_to_copy" and str(kwargs.get("device")) == "cpu"
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    near_args, near_kwargs = tree_map_only(Far, lambda far: far.near, (args, kwargs))
    out = function(*near_args, **near_kwargs)
    if to_processor:
        return out
    return _like(out, args, near_args)


def _like(out: Any, args: Any, near_args: Any) -> Any:
    """Results on the device; those that are arguments, as of operations in place, are the arguments themselves."""
    same = {
        id(near): far
        for far, near in zip(tree_leaves(args), tree_leaves(near_args), strict=True)
        if isinstance(far, Far)
    }
    return tree_map_only(Tensor, lambda near: same[id(near)] if id(near) in same else Far(near), out)


class Pretend(TorchFunctionMode):
    """Within it there is a CUDA device of capability 9.0."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()
        self.kernels: dict[str, Any] = {}
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Pretend":
        active.append(self)
        self._patch.setattr(hardware, "capability", lambda place: (9, 0) if place.type == "cuda" else (0, 0))
        for name in FACTORIES:
            self._patch.setattr(torch, name, _making(getattr(torch, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()
        active.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist and isinstance(args[0], Far):
            return args[0].near.tolist()
        if function is Tensor.numpy:
            assert not isinstance(args[0], Far), "a tensor on cuda has no array"
        places = [leaf for leaf in tree_leaves((args, kwargs)) if _is_cuda(leaf)]
        if not places or function in (torch.device, torch.autocast):
            return function(*args, **kwargs)
        target = args[0] if function is Tensor.to else None
        args, kwargs = tree_map_only(
            object, lambda leaf: torch.device("cpu") if _is_cuda(leaf) else leaf, (args, kwargs)
        )
        if isinstance(target, Far):  # from cuda to cuda: what else is asked for
            rest = [arg for arg in args[1:] if arg is not None and arg != torch.device("cpu")]
            return (
                function(target, *rest, **{k: v for k, v in kwargs.items() if k != "device"})
                if rest or kwargs
                else target
            )
        return tree_map_only(Tensor, Far, function(*args, **kwargs))


def _making(make: Any) -> Any:
    """A factory that knows the device, also where the mode is out of sight: in what a backward pass computes again."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if _is_cuda(device):
            return Far(make(*args, **kwargs))
        return make(*args, **kwargs) if device is None else make(*args, device=device, **kwargs)

    return made


def _is_cuda(leaf: Any) -> bool:
    return (isinstance(leaf, torch.device) and leaf.type == "cuda") or (
        isinstance(leaf, str) and leaf.startswith("cuda")
    )


@contextmanager
def flash_by_hand(pretend: Pretend) -> Iterator[None]:
    """The library's variable-length flash attention, document by document from its contract."""
    name = "torch_attn::_varlen_attn"
    pretend.kernels |= {name: _forward, f"{name}_backward": _backward}
    yield


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *rest: Any
) -> Any:
    causal, scale, window = rest[:3]
    assert causal
    assert scale is None
    assert list(window) == [-1, 0]
    for cu, length, x in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert cu.dtype == torch.int32
        assert cu[0] == 0
        assert cu[-1] == len(x)
        assert cu.diff().min() > 0
        assert cu.diff().max() == length
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    out = torch.cat([_document(*x) for x in _documents(q, k, v, cu_q, cu_k)]).to(q.dtype)
    lse = torch.zeros(q.shape[1], len(q), dtype=torch.float32)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *rest: Any,
) -> Any:
    assert out.shape == grad.shape == q.shape
    assert lse.shape == (q.shape[1], len(q))
    parts = [
        _gradients(*x, g)
        for x, g in zip(_documents(q, k, v, cu_q, cu_k), grad.split(cu_q.diff().tolist()), strict=True)
    ]
    return tuple(torch.cat(part).to(q.dtype) for part in zip(*parts, strict=True))


def _documents(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Any:
    parts = (x.split(cu.diff().tolist()) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
    return zip(*parts, strict=True)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Of each query [h, q, k] over the keys up to its own, in float32."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def _document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention [T, H, h] of one document, in float32."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return torch.einsum("hqk,khd->qhd", _probabilities(q.float(), k), v)


def _gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `_document` to its three inputs."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    q, grad = q.float(), grad.float()
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    p = _probabilities(q, k)
    dp = torch.einsum("qhd,khd->hqk", grad, v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq = torch.einsum("hqk,khd->qhd", ds, k)
    dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, grad)
    return dq, *(x.unflatten(1, (heads, group)).sum(2) for x in (dk, dv))
