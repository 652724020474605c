"""Metrics of a stage over its steps: values into the artifact, times into the logs, both to TensorBoard."""

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgspec

from pensar.base.files import write_atomic


class Metrics:
    """Writes `out/metrics.jsonl` (deterministic values) and `logs/timings.jsonl` (what the clock said).

    A killed run must end with the same bytes as an uninterrupted one: log a step before the checkpoint that
    holds it is saved, and `rewind` to the checkpoint's step before going on.
    """

    def __init__(self, out: Path, logs: Path) -> None:
        self._logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        self._paths = (out / "metrics.jsonl", logs / "timings.jsonl")
        self._files = [_open_whole_lines(path) for path in self._paths]
        self._writer: Any = None

    def log(self, step: int, **values: float) -> None:
        """Appends a row of values that depend on the configuration alone, never on the clock."""
        self._append(0, step, values)

    def timing(self, step: int, **values: float) -> None:
        """Appends a row of times, rates and memory."""
        self._append(1, step, values)

    def rewind(self, step: int) -> None:
        """Drops every row after `step`, as a run does that goes on from an earlier checkpoint."""
        for index, path in enumerate(self._paths):
            self._files[index].close()
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if msgspec.json.decode(line)["step"] <= step]
            if len(kept) < len(lines):
                write_atomic(path, b"".join(kept))
            self._files[index] = _open_whole_lines(path)

    def close(self) -> None:
        """Closes the files; called by `with`."""
        for file in self._files:
            file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, index: int, step: int, values: dict[str, float]) -> None:
        row = {"step": int(step)} | {name: float(value) for name, value in values.items()}
        self._files[index].write(msgspec.json.encode(row) + b"\n")
        self._files[index].flush()
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._logs / "tensorboard"))
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)


def _open_whole_lines(path: Path) -> BinaryIO:
    """Opens for appending after the last whole line: a kill in mid-write leaves a torn one."""
    path.touch()
    file = path.open("rb+")
    content = file.read()
    end = content.rfind(b"\n") + 1
    file.truncate(end)
    file.seek(end)
    return file
