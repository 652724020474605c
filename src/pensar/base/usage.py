"""What processes have used: CPU-seconds, the highest memory since the last reset; and what becomes of freed memory."""

import ctypes
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux wants to read in clear_refs to start the high-water mark anew (man 5 proc)."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt (man 3 mallopt)."""
_MOST = 32 * 2**20
"""The largest pieces that glibc can be told to keep, bytes."""
_keeping = threading.Lock()
_keepers: list[ctypes.CDLL] = []
"""One for each that is within `keeping_freed_memory` now."""


@dataclass(frozen=True)
class ResourceUse:
    """Of one process and the children that it has waited for."""

    cpu_seconds: float
    peak_memory_bytes: int


def usage_now() -> ResourceUse:
    """Use of this process; the peak is since `reset_peak` on Linux, since its start elsewhere."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return ResourceUse(seconds, _high_water() or own.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def reset_peak() -> None:
    """Starts the peak memory anew where the system allows it."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        # Not Linux, or a container that forbids it: the peak then counts from the start of the process.
        return


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Within it glibc keeps what is freed, in pieces of up to 32 MiB; at the end it goes back to the system.

    A training step asks for the same pieces as the one before. Given back in between, they come as fresh pages, each
    of which costs some microseconds: a tenth of a step where tensors are large and products fast. Afterwards glibc's
    thresholds are those to which it would have raised them by itself, and stay there. Other C libraries go on as they
    are.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "malloc_trim"):
        yield
        return
    with _keeping:
        _keepers.append(library)
        library.mallopt(_MMAP_THRESHOLD, _MOST)
        library.mallopt(_TRIM_THRESHOLD, 2**30)
    try:
        yield
    finally:
        with _keeping:
            _keepers.pop()
            if not _keepers:
                library.mallopt(_TRIM_THRESHOLD, 2 * _MOST)
                library.malloc_trim(0)


def _high_water() -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
