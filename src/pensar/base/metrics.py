"""Metrics of a stage over its steps: values into the artifact, times into the logs, both to the trackers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgspec

from pensar.base.files import write_atomic
from pensar.base.trackers import Trackers

METRICS, TIMINGS = "metrics", "timings"
LOSSES, LAYERS = "losses", "layers"
"""Records of nested values, at an interval: the loss by groups of documents, and what happens layer by layer."""
ABOUT = "training.json"
"""In the log folder: what a stage under way says of itself."""


@dataclass(frozen=True)
class Recording:
    """What is made of training beside its artifact; part of the runtime, never of an artifact's identity."""

    trackers: tuple[str, ...] = ("tensorboard",)
    profile: tuple[int, int] = (0, 0)
    """First step to profile and how many; none with 0 of them."""


class Metrics:
    """Writes `out/metrics.jsonl` (deterministic values) and `logs/timings.jsonl` (what the clock said).

    A killed run must end with the same bytes as an uninterrupted one: log a step before the checkpoint that
    holds it is saved, and `rewind` to the checkpoint's step before going on.
    """

    def __init__(self, out: Path, logs: Path, recording: Recording | None = None) -> None:
        self._logs = logs
        self._trackers = Trackers((recording or Recording()).trackers, logs)
        logs.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        self._paths = {name: out / f"{name}.jsonl" for name in (METRICS, LOSSES, LAYERS)}
        self._paths[TIMINGS] = logs / f"{TIMINGS}.jsonl"
        self._files: dict[str, BinaryIO] = {}
        for name, path in self._paths.items():
            if name in (METRICS, TIMINGS) or path.exists():
                self._files[name] = _open_whole_lines(path)

    def log(self, step: int, **values: float) -> None:
        """Appends a row of values that depend on the configuration alone, never on the clock."""
        self._append(METRICS, step, {name: float(value) for name, value in values.items()})

    def timing(self, step: int, **values: float) -> None:
        """Appends a row of times, rates and memory."""
        self._append(TIMINGS, step, {name: float(value) for name, value in values.items()})

    def note(self, record: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends a row of nested values, deterministic like those of `log`, to one of the records at an interval."""
        if record not in self._files:
            self._files[record] = _open_whole_lines(self._paths[record])
        self._append(record, step, values)

    def about(self, **facts: Any) -> None:
        """Says of the work under way what its rows do not, such as how many steps there are."""
        write_atomic(self._logs / ABOUT, msgspec.json.encode(facts) + b"\n")

    def rewind(self, step: int) -> None:
        """Drops every row after `step`, as a run does that goes on from an earlier checkpoint."""
        last = -1
        for name in self._files:
            path = self._paths[name]
            self._files[name].close()
            lines = path.read_bytes().splitlines(keepends=True)
            steps = [msgspec.json.decode(line, type=_Step).step for line in lines]
            last = max([last, *steps])
            kept = [line for line, its in zip(lines, steps, strict=True) if its <= step]
            if len(kept) < len(lines):
                write_atomic(path, b"".join(kept))
            self._files[name] = _open_whole_lines(path)
        self._trackers.rewind(step, last)

    def close(self) -> None:
        """Closes the files; called by `with`."""
        for file in self._files.values():
            file.close()
        self._trackers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, record: str, step: int, values: Mapping[str, Any]) -> None:
        row = {"step": int(step), **values}
        self._files[record].write(msgspec.json.encode(row) + b"\n")
        self._files[record].flush()
        prefix = "" if record in (METRICS, TIMINGS) else f"{record}/"
        self._trackers.log(step, {prefix + name: value for name, value in _leaves(values)})


class _Step(msgspec.Struct):
    step: int


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested values by path; of a list its entries by place."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}/")
        elif isinstance(value, list | tuple):
            yield from _leaves({str(place): entry for place, entry in enumerate(value)}, f"{path}{name}/")
        else:
            yield path + name, float(value)


def _open_whole_lines(path: Path) -> BinaryIO:
    """Opens for appending after the last whole line: a kill in mid-write leaves a torn one."""
    path.touch()
    file = path.open("rb+")
    content = file.read()
    end = content.rfind(b"\n") + 1
    file.truncate(end)
    file.seek(end)
    return file
