"""What processes have used: CPU-seconds, and the highest memory since the last reset."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux wants to read in clear_refs to start the high-water mark anew (man 5 proc)."""


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


def _high_water() -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
