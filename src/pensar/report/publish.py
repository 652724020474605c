"""Writing the report of a run: `report.json` and `index.html`, each beside its place and then renamed."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from pensar.base.errors import DataError
from pensar.base.files import write_atomic

PAGE = "index.html"
NUMBERS = "report.json"
FOLDER = "report"
"""Name of the report's folder in a run."""


def write(run_folder: Path, shown: Sequence[Path] = ()) -> Path:
    """Draws the report of a run, finished or not, into its folder `report`; returns the path of the page.

    `shown` are the artifacts that it is about; without them, what went into the last evaluation.
    """
    folder = run_folder / FOLDER
    if folder.is_symlink():
        # The link shows an artifact, and an artifact never changes.
        folder.unlink()
    return write_report(run_folder, folder, shown)


def write_report(run: Path, out: Path, shown: Sequence[Path] = ()) -> Path:
    """Draws the report of a run into `out`; returns the path of the page.

    Raises DataError when `run` is no folder or when what a stage wrote cannot be read.
    """
    from pensar.report.collect import collect
    from pensar.report.page import render

    if not run.is_dir():
        raise DataError(f"{run} is no folder; give the folder of a run, such as runs/tiny")
    report = collect(run.resolve(), shown)
    numbers = msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
    write_atomic(out / NUMBERS, numbers)
    write_atomic(out / PAGE, render(report))
    return out / PAGE
