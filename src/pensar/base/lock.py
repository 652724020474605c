"""A lock that keeps two runs out of one folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pensar.base.errors import RunError
from pensar.base.files import disk_full_explained

LOCK = ".lock"


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the lock of a run's folder; RunError naming the process that holds it already.

    The system frees it when the process ends, however it ends.
    """
    with disk_full_explained(root):
        root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise RunError(
                f"{root} is in use by process {pid}; wait until that run ends, or stop it with `kill {pid}`"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
