"""C++ libraries: built by the machine's compiler at first use, kept in the user's cache, loaded through ctypes.

Nothing of torch is compiled in, so that a build takes seconds and outlives torch's updates.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pensar.base.errors import RunError

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

Signatures = Mapping[str, tuple[object, list[object]]]
"""Function -> type of its result, types of its arguments."""


def cache_folder() -> Path:
    """Where built libraries are kept, by the XDG rules; RunError where there is no home."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise RunError(f"{error}: set XDG_CACHE_HOME to a folder for built libraries") from error
    return Path(cache) / "pensar" / "native"


def built(source: Path, folder: Path, *, includes: Sequence[Path] = (), extra: Sequence[str] = ()) -> Path:
    """The library's file in `folder`, compiled unless it is there; RunError, naming the reason, where it cannot be.

    `includes` are folders of headers besides the source's own, `extra` further flags. The file's name is a digest of
    sources, flags, compiler and processor: another version or machine gets another file. It is written beside and
    renamed, so that processes which start together may all build it.
    """
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise RunError(
            f"no C++ compiler ({', '.join(COMPILERS)}) is on the path; install one for the fast kernels"
        )
    path = folder / f"{_digest(compiler, source, includes, extra)}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    flags = (*FLAGS, *(f"-I{place}" for place in includes))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as draft:
        out = Path(draft) / path.name
        for target in TARGETS:
            command = [compiler, *flags, *target, *extra, str(source), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                out.replace(path)
                return path
    raise RunError(f"{compiler} does not build the kernels; it says: {done.stderr.strip()[-400:]}")


def opened(path: Path, signatures: Signatures) -> ctypes.CDLL:
    """A built library whose functions know their types."""
    found = ctypes.CDLL(str(path))
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def _digest(compiler: str, source: Path, includes: Sequence[Path], extra: Sequence[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    if version.returncode:
        raise RunError(f"{compiler} does not tell its version; it says: {version.stderr.strip()[-400:]}")
    parts = [version.stdout, *FLAGS, *extra, platform.machine(), _features()]
    headers = [path for folder in (source.parent, *includes) for path in sorted(folder.glob("*.h"))]
    parts += [path.name + path.read_text(encoding="utf-8") for path in (source, *headers)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _features() -> str:
    """What the processor can do, as the system lists it: -march=native means another target on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    kept = ("vendor_id", "model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
