"""Experts and attention in training on a CPU that multiplies pairs of bfloat16: a C++ library, and its calls.

torch's products of that type are as fast; what is saved is everything around them. An expert's rows are read where they
lie, rounded on the way and multiplied while they are in the cache, and a layer is one call instead of some thousand.
Shape legend: N tokens, D hidden, E experts, I expert width, k experts per token, M = N k, R rows with those that round
each expert up; B batch, T tokens, H query heads, K key-value heads, h head_dim.
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pensar.base.errors import RunError
from pensar.base.native import Signatures, built, cache_folder, opened

log = logging.getLogger(__name__)

HEADERS = Path(__file__).parent
ROUNDED = 8
"""The rows of an expert are a multiple of this: those of a tile."""
COLUMNS = 32
"""So are widths, of this: the columns of a tile."""

_P, _I64 = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: Signatures = {
    "pensar_pairs": (_I64, []),
    "pensar_experts_forward": (None, [_P] * 2),
    "pensar_experts_backward": (None, [_P] * 6),
    "pensar_attention_forward": (None, [_P] * 2),
    "pensar_attention_backward": (None, [_P] * 6),
}


class _Experts(ctypes.Structure):
    """The structure of `experts.h`."""

    _fields_: ClassVar = [
        *((name, _I64) for name in ("tokens", "hidden", "experts", "width", "chosen")),
        *((name, _P) for name in ("x", "weights", "order", "counts", "gate_up", "down")),
        ("rows", _I64),
        ("room", _P),
    ]


class _Attention(ctypes.Structure):
    """The structure of `attention.h`."""

    _fields_: ClassVar = [
        *((name, _I64) for name in ("rows", "tokens", "heads", "kv_heads", "size")),
        *((name, _P) for name in "qkv"),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where the processor has no such units, or better ones that torch makes use of, or nothing can be built."""
    try:
        found = opened(built(HEADERS / "train.cpp", cache_folder()), _SIGNATURES)
    except (RunError, OSError, AttributeError) as error:
        log.warning("training with torch's kernels: %s", error)
        return None
    return found if found.pensar_pairs() else None


def takes(*widths: int) -> bool:
    """Whether this processor computes products of these widths here. Torch's kernels share them out to threads, these
    do not."""
    whole = all(width % COLUMNS == 0 for width in widths)
    return whole and torch.get_num_threads() == 1 and library() is not None


class Experts:
    """`routed_swiglu` of tokens in bfloat16 by matrices in float32 (`model/routed.py`).

    `room_R2I` holds gate and up of each expert's rows, one expert after another.
    """

    def __init__(
        self,
        x_ND: Tensor,
        weights_Nk: Tensor,
        order_M: Tensor,
        counts_E: Tensor,
        gate_up_E2ID: Tensor,
        down_EDI: Tensor,
        room_R2I: Tensor,
    ) -> None:
        inputs = (x_ND, weights_Nk, order_M, counts_E, gate_up_E2ID, down_EDI)
        self._inputs = [x.contiguous() for x in inputs]
        self._room = room_R2I
        (num, hidden), (experts, _, width) = x_ND.shape, down_EDI.shape
        places = (x.data_ptr() for x in self._inputs)
        room = len(room_R2I), room_R2I.data_ptr()
        self._structure = _Experts(num, hidden, experts, width, weights_Nk.shape[1], *places, *room)

    def forward(self) -> Tensor:
        """Each token's sum [N, D], in float32; fills the room."""
        out_ND = self._like(0, torch.float32)
        _call("experts_forward", self._structure, out_ND)
        return out_ND

    def backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of tokens, their experts' weights, and both matrices."""
        dx_ND, dweights_Nk, dgate_up, ddown = (self._like(place, torch.float32) for place in (0, 1, 4, 5))
        grad_ND = grad_ND.to(torch.bfloat16).contiguous()
        _call("experts_backward", self._structure, grad_ND, dx_ND, dweights_Nk, dgate_up, ddown)
        return dx_ND.to(torch.bfloat16), dweights_Nk, dgate_up, ddown

    def _like(self, place: int, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(self._inputs[place], dtype=dtype)


class Attention:
    """Causal attention of values in bfloat16, queries and keys rounded to it (`model/causal.py`)."""

    def __init__(self, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> None:
        self._inputs = [x.to(torch.bfloat16).contiguous() for x in (q_BTHh, k_BTKh, v_BTKh)]
        places = (x.data_ptr() for x in self._inputs)
        self._structure = _Attention(*q_BTHh.shape[:3], *k_BTKh.shape[2:], *places)

    def forward(self) -> Tensor:
        """[B, T, H, h] in bfloat16."""
        out_BTHh = torch.empty_like(self._inputs[0])
        _call("attention_forward", self._structure, out_BTHh)
        return out_BTHh

    def backward(self, out_BTHh: Tensor, grad_BTHh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values, in float32."""
        dq, dk, dv = (torch.empty_like(x, dtype=torch.float32) for x in self._inputs)
        out_BTHh, grad_BTHh = (x.to(torch.bfloat16).contiguous() for x in (out_BTHh, grad_BTHh))
        _call("attention_backward", self._structure, out_BTHh, grad_BTHh, dq, dk, dv)
        return dq, dk, dv


def _call(name: str, structure: ctypes.Structure, *tensors: Tensor) -> None:
    function = getattr(library(), f"pensar_{name}")
    function(ctypes.byref(structure), *(x.data_ptr() for x in tensors))
