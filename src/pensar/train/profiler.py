"""A profile of a few steps on request: where their time goes, operator by operator, in the stage's log folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TOP = 25
"""Operators of the table."""
Take = Callable[[int], dict[str, float]]


def profiled(take: Take, steps: int, wanted: tuple[int, int], logs: Path, rank: int) -> Take:
    """`take`, which profiles steps `first` to `first + count - 1` of `steps` when it comes to them.

    Every rank writes `profile/steps-<first>-<last>.rank-<rank>.json.gz`, a trace for chrome://tracing or
    ui.perfetto.dev, and a table of the operators that take longest as `.txt` beside it.
    """
    first, count = wanted
    last = min(first + count, steps) - 1
    if count < 1 or last < first:
        return take
    running: list[Any] = []

    def stop(write: bool) -> None:
        profiler = running.pop()
        profiler.__exit__(None, None, None)
        if write:
            _write(profiler, logs / "profile", f"steps-{first}-{last}.rank-{rank}")

    def take_profiled(step: int) -> dict[str, float]:
        if step == first and not running:
            running.append(_opened())
        if not running:
            return take(step)
        try:
            with torch.profiler.record_function(f"step {step}"):
                values = take(step)
        except BaseException as error:
            # A guard that rewinds, or stops the run, ends the window early; nobody waits for a file when interrupted.
            stop(write=isinstance(error, Exception))
            raise
        if step == last:
            stop(write=True)
        return values

    return take_profiled


def _opened() -> Any:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=kinds)
    profiler.__enter__()
    return profiler


def _write(profiler: Any, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=TOP, max_name_column_width=60)
    (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
