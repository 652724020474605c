"""The C++ library: built by the machine's compiler at first use, kept in the user's cache, loaded through ctypes.

Nothing of torch is compiled in, so that a build takes seconds and outlives torch's updates. Where there is no compiler,
`library()` says why and the engine computes with torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pensar.base.errors import RunError
from pensar.infer.native.structs import Batch, Linear, Model

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# Contraction is off: the code says where products and sums are fused, so that every tile rounds alike.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
    "-shared",
    "-fPIC",
    "-pthread",
)
TARGETS = (("-march=native",), ("-mcpu=native",), ())
"""The first that the compiler takes."""

P, I64 = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: Mapping[str, tuple[object, list[object]]] = {
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


def cache_folder() -> Path:
    """Where built libraries are kept, by the XDG rules."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pensar" / "native"


def built(folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """The library's file in `folder`, compiled unless it is there; `extra` are further flags.

    Its name is a digest of sources, flags, compiler and processor: another version or machine gets another file. It is
    written beside and renamed, so that processes which start together may all build it.
    """
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise RunError(
            f"no C++ compiler ({', '.join(COMPILERS)}) is on the path; install one for the fast kernels"
        )
    path = folder / f"{_digest(compiler, extra)}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as draft:
        out = Path(draft) / path.name
        for target in TARGETS:
            command = [compiler, *FLAGS, *target, *extra, str(SOURCES / "step.cpp"), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                out.replace(path)
                return path
    raise RunError(f"{compiler} does not build the kernels; it says: {done.stderr.strip()[-400:]}")


def opened(path: Path) -> ctypes.CDLL:
    """A built library with its signatures."""
    found = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


@functools.cache
def _absence() -> str | None:
    try:
        library()
    except (RunError, OSError) as error:
        log.warning("computing with torch: %s", error)
        return str(error)
    return None


def _digest(compiler: str, extra: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, *FLAGS, *extra, platform.machine(), _features()]
    parts += [path.name + path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.[hc]*"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _features() -> str:
    """What the processor can do, as the system lists it: -march=native means another target on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    kept = ("vendor_id", "model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
