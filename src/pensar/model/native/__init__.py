"""Experts and attention in training on a CPU, in float32 or in bfloat16: a C++ library, and its calls.

Its products run at nine tenths of what the processor can do, torch's at eight; most of what is saved lies around them.
An expert's rows are read where they are, rounded on the way and multiplied while they are in the cache, and a layer is
one call instead of some thousand.
Shape legend: N tokens, D hidden, E experts, I expert width, k experts per token, M = N k rows by expert; B batch,
T tokens, H query heads, K key-value heads, h head_dim.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pensar.base.errors import RunError
from pensar.base.native import Signatures, built, cache_folder, opened

log = logging.getLogger(__name__)

HEADERS = Path(__file__).parent
COLUMNS = 32
"""Widths are a multiple of this: the columns of a tile."""

_P, _I64 = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: Signatures = {
    "pensar_takes": (_I64, [_I64]),
    "pensar_experts_forward": (None, [_I64, *[_P] * 2]),
    "pensar_experts_backward": (None, [_I64, *[_P] * 6]),
    "pensar_attention_forward": (None, [_I64, *[_P] * 2]),
    "pensar_attention_backward": (None, [_I64, *[_P] * 6]),
}


class _Experts(ctypes.Structure):
    """The structure of `experts.h`."""

    _fields_: ClassVar = [
        *((name, _I64) for name in ("tokens", "hidden", "experts", "width", "chosen")),
        *((name, _P) for name in ("x", "weights", "order", "counts", "gate_up", "down", "room")),
    ]


class _Attention(ctypes.Structure):
    """The structure of `attention.h`."""

    _fields_: ClassVar = [
        *((name, _I64) for name in ("rows", "tokens", "heads", "kv_heads", "size")),
        *((name, _P) for name in "qkv"),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where it cannot be built; the log says once why."""
    try:
        return opened(built(HEADERS / "train.cpp", cache_folder()), _SIGNATURES)
    except (RunError, OSError) as error:
        log.warning("training with torch's kernels: %s", error)
        return None


def takes(dtype: torch.dtype, *widths: int) -> bool:
    """Whether this processor computes products in this type and of these widths here.

    Not with several threads, to which torch's products are shared out and these are not, and not in bfloat16 where the
    processor has no units for it, or better ones that torch uses.
    """
    if dtype not in (torch.float32, torch.bfloat16) or torch.get_num_threads() > 1:
        return False
    if any(width % COLUMNS for width in widths):
        return False
    found = library()
    return found is not None and bool(found.pensar_takes(dtype == torch.bfloat16))


class Experts:
    """`routed_swiglu` by matrices in float32, products in the type of the tokens (`model/routed.py`)."""

    def __init__(
        self,
        x_ND: Tensor,
        weights_Nk: Tensor,
        order_M: Tensor,
        counts_E: Tensor,
        gate_up_E2ID: Tensor,
        down_EDI: Tensor,
        gate_up_M2I: Tensor,
    ) -> None:
        (num, hidden), k, (experts, _, width) = x_ND.shape, weights_Nk.shape[1], down_EDI.shape
        shapes = [(num, hidden), (num, k), (num * k,), (experts,), (experts, 2 * width, hidden)]
        shapes += [(experts, hidden, width), (num * k, 2 * width)]
        types = [x_ND.dtype, torch.float32, *[torch.int64] * 2, *[torch.float32] * 2, x_ND.dtype]
        self._inputs = [
            x.contiguous() for x in (x_ND, weights_Nk, order_M, counts_E, gate_up_E2ID, down_EDI, gate_up_M2I)
        ]
        _agree(self._inputs, shapes, types)
        self._structure = _Experts(num, hidden, experts, width, k, *(x.data_ptr() for x in self._inputs))

    def forward(self) -> Tensor:
        """Each token's sum [N, D], in float32; gate and up go where they were asked for."""
        out_ND = _empty_like(self._inputs[0])
        self._call("experts_forward", out_ND)
        return out_ND

    def backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of tokens, their experts' weights, and both matrices."""
        dx_ND, dweights_Nk, dgate_up, ddown = (_empty_like(self._inputs[place]) for place in (0, 1, 4, 5))
        dtype = self._inputs[0].dtype
        self._call("experts_backward", grad_ND.to(dtype).contiguous(), dx_ND, dweights_Nk, dgate_up, ddown)
        return dx_ND.to(dtype), dweights_Nk, dgate_up, ddown

    def _call(self, name: str, *tensors: Tensor) -> None:
        _call(name, self._inputs[0].dtype, self._structure, *tensors)


class Attention:
    """Causal attention in the type of the values, to which queries and keys are rounded (`model/causal.py`)."""

    def __init__(self, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> None:
        self._dtype = v_BTKh.dtype
        self._inputs = [self._ready(x) for x in (q_BTHh, k_BTKh, v_BTKh)]
        (rows, tokens, heads, size), kv_heads = q_BTHh.shape, k_BTKh.shape[2]
        if heads % kv_heads:
            raise ValueError(f"{heads} heads of queries do not share {kv_heads} of keys evenly")
        kept = (rows, tokens, kv_heads, size)
        _agree(self._inputs, [q_BTHh.shape, kept, kept], [self._dtype] * 3)
        places = (x.data_ptr() for x in self._inputs)
        self._structure = _Attention(*q_BTHh.shape[:3], *k_BTKh.shape[2:], *places)

    def forward(self) -> Tensor:
        """[B, T, H, h] in the type of the values."""
        out_BTHh = torch.empty_like(self._inputs[0])
        _call("attention_forward", self._dtype, self._structure, out_BTHh)
        return out_BTHh

    def backward(self, out_BTHh: Tensor, grad_BTHh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values, in float32."""
        dq, dk, dv = (_empty_like(x) for x in self._inputs)
        out_BTHh, grad_BTHh = self._ready(out_BTHh), self._ready(grad_BTHh)
        _call("attention_backward", self._dtype, self._structure, out_BTHh, grad_BTHh, dq, dk, dv)
        return dq, dk, dv

    def _ready(self, x: Tensor) -> Tensor:
        return x.to(self._dtype).contiguous()


def _agree(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], types: Sequence[torch.dtype]) -> None:
    """The library looks at nothing but addresses."""
    for number, (x, shape, dtype) in enumerate(zip(tensors, shapes, types, strict=True)):
        if tuple(x.shape) != tuple(shape) or x.dtype != dtype:
            raise ValueError(f"input {number} is {x.dtype} {tuple(x.shape)} and not {dtype} {tuple(shape)}")


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32)


def _call(name: str, dtype: torch.dtype, structure: ctypes.Structure, *tensors: Tensor) -> None:
    function = getattr(library(), f"pensar_{name}")
    function(dtype == torch.bfloat16, ctypes.byref(structure), *(x.data_ptr() for x in tensors))
