"""The engine's C++ library. Where there is no compiler, `library()` says why and the engine computes with torch."""

import ctypes
import functools
import logging
from pathlib import Path

from pensar.base import native
from pensar.base.errors import RunError
from pensar.base.native import Signatures, cache_folder
from pensar.infer.native.structs import Batch, Linear, Model
from pensar.model.native import HEADERS

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "step.cpp"

P, I64 = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: Signatures = {
    "pensar_step": (I64, [ctypes.POINTER(Model), ctypes.POINTER(Batch), P]),
    "pensar_team": (P, [I64, I64]),
    "pensar_dismiss": (None, [P]),
    "pensar_columns": (I64, []),
    "pensar_panel_bytes": (I64, [I64, I64]),
    "pensar_head_bytes": (I64, [I64, I64]),
    "pensar_units": (ctypes.c_char_p, []),
    "pensar_pack": (None, [I64, P, I64, P, I64, P, P]),
    "pensar_unpack": (None, [ctypes.POINTER(Linear), P, I64, P]),
    "pensar_linear": (None, [ctypes.POINTER(Linear), P, I64, P, P]),
    "pensar_peak": (I64, [I64, I64]),
    "pensar_read": (I64, [P, I64]),
    "pensar_weigh": (None, [P, I64, I64, P, P, P, P, P, P]),
    "pensar_exp": (None, [P, I64, P]),
    "pensar_norm": (None, [P, P, I64, I64, ctypes.c_double, P]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library for this processor; RunError, naming the reason, where it cannot be built."""
    return opened(built(cache_folder()))


def available() -> bool:
    """Whether there is a library here; the log says once why not."""
    reason = _absence()
    return reason is None


def describe() -> str:
    """What computes: the units that the library was built for, or why there is none."""
    reason = _absence()
    return f"native ({library().pensar_units().decode()})" if reason is None else f"torch ({reason})"


def built(folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """The library's file in `folder`; `extra` are further flags."""
    return native.built(SOURCE, folder, includes=(HEADERS,), extra=extra)


def opened(path: Path) -> ctypes.CDLL:
    """A built library with its signatures."""
    return native.opened(path, _SIGNATURES)


@functools.cache
def _absence() -> str | None:
    try:
        library()
    except (RunError, OSError) as error:
        log.warning("computing with torch: %s", error)
        return str(error)
    return None
