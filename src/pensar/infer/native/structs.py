"""The structures of `model.h` and `gemm.h`, field by field."""

import ctypes
from typing import ClassVar

_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
Fields = list[tuple[str, type]]


class Linear(ctypes.Structure):
    """Packed weights of one product."""

    _fields_: ClassVar[Fields] = [
        ("kind", _I32),
        ("outputs", _I32),
        ("inputs", _I32),
        ("panels", _I32),
        ("data", _P),
    ]


class Change(ctypes.Structure):
    """What an adapter adds to one product."""

    _fields_: ClassVar[Fields] = [("a", Linear), ("b", Linear), ("gain", _P)]


class Layer(ctypes.Structure):
    """The weights of one block."""

    _fields_: ClassVar[Fields] = [
        *((name, _P) for name in ("input_norm", "q_norm", "k_norm", "post_norm")),
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down", "router")),
        ("expert_gate_up", ctypes.POINTER(Linear)),
        ("expert_down", ctypes.POINTER(Linear)),
        ("changes", ctypes.POINTER(Change)),
    ]


_SHAPE = ("vocab", "hidden", "num_layers", "heads", "kv_heads", "head_dim", "width")
_MIXTURE = ("experts", "chosen", "norm_chosen", "adapters")


class Model(ctypes.Structure):
    """A model's shape, weights and cache."""

    _fields_: ClassVar[Fields] = [
        *((name, _I64) for name in (*_SHAPE, *_MIXTURE)),
        ("eps", ctypes.c_double),
        ("head", Linear),
        ("embedding", _P),
        ("embedding_kind", _I64),
        *((name, _P) for name in ("final_norm", "cosine", "sine")),
        ("positions", _I64),
        ("layers", ctypes.POINTER(Layer)),
        *((name, _I64) for name in ("cache", "pages", "page_bytes")),
        ("store", _P),
    ]


class Batch(ctypes.Structure):
    """What one step computes, and where its results go."""

    _fields_: ClassVar[Fields] = [
        *((name, _I64) for name in ("rows", "tokens", "wanted", "width")),
        *(
            (name, _P)
            for name in ("ids", "positions", "starts", "lengths", "page_numbers", "wanted_at", "adapters")
        ),
        ("logits", _P),
        ("hidden", _P),
    ]
