"""Following a run by its files: which stages there are, and how far the one under way has got."""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from pensar.base.attempt import DRAFT_SUFFIX
from pensar.base.errors import DataError
from pensar.base.identity import LOGS
from pensar.base.lock import LOCK
from pensar.base.manifest import FOLDER, Manifest, artifacts_in
from pensar.base.metrics import ABOUT, LAYERS, LOSSES, METRICS, TIMINGS
from pensar.cli.braille import squeezed

RECENT_SECONDS = 60.0
"""A stage that wrote less long ago is under way, even where the lock of another machine cannot be seen."""
RATE_STEPS = 50
"""Steps whose median time the time left is told by."""
POINTS = 256
"""Values of a series, each a mean of neighbours where there are more steps."""
Row = dict[str, Any]


class Tail:
    """The rows of a record that grows, and may be cut back when a run goes on from a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._read = 0
        self._file: tuple[int, int] = (0, 0)

    def look(self) -> list[Row]:
        """All whole rows there are now; only what is new is read."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self.rows, self._read = [], 0
            return self.rows
        with file:
            self._go_on(file)
        return self.rows

    def _go_on(self, file: BinaryIO) -> None:
        state = os.fstat(file.fileno())
        if (state.st_dev, state.st_ino) != self._file or state.st_size < self._read:
            self.rows, self._read = [], 0
            self._file = (state.st_dev, state.st_ino)
        file.seek(self._read)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._read += len(line)
            self.rows.append(self._decoded(line))

    def _decoded(self, line: bytes) -> Row:
        try:
            return msgspec.json.decode(line, type=Row)
        except msgspec.DecodeError as error:
            raise DataError(
                f"{self.path}: not a row of a record ({error}); mend or remove the line"
            ) from None


class Run:
    """A run's folder, looked at again and again."""

    def __init__(self, folder: Path) -> None:
        """`folder` may also be that of one stage, done or begun: then only that one is looked at."""
        if not folder.is_dir():
            raise DataError(
                f"{folder} is no folder; give a run's folder, such as runs/tiny, or one of its stages"
            )
        folder = folder.resolve()
        alone = FOLDER.fullmatch(folder.name.removesuffix(DRAFT_SUFFIX))
        self.folder = folder.parent if alone else folder
        self._only = folder.name.removesuffix(DRAFT_SUFFIX) if alone else ""
        self._tails: dict[Path, Tail] = {}

    def look(self) -> Row:
        """Everything that a frame shows, as one document."""
        done = {artifact.name: artifact.manifest for artifact in reversed(artifacts_in(self.folder))}
        begun = self._begun()
        busy = self._busy(begun)
        stages = [
            _stage_done(name, manifest) for name, manifest in done.items() if manifest and name not in begun
        ]
        stages += [
            {
                "stage": _stage_of(name),
                "folder": name + DRAFT_SUFFIX,
                "status": "under way" if busy else "begun",
            }
            for name in begun
        ]
        chosen = self._chosen(list(done), begun)
        return {
            "folder": str(self.folder),
            "under_way": busy,
            "stages": stages,
            "training": self._training(chosen, chosen in begun) if chosen else None,
        }

    def _begun(self) -> list[str]:
        """Stages with a draft, the one that wrote last at the end."""
        drafts = [path for path in self.folder.glob(f"*{DRAFT_SUFFIX}") if path.is_dir()]
        names = [path.name.removesuffix(DRAFT_SUFFIX) for path in drafts]
        return sorted((name for name in names if FOLDER.fullmatch(name)), key=self._written)

    def _written(self, name: str) -> float:
        """When a stage last wrote into its logs."""
        times = [0.0]
        for path in (self.folder / LOGS / name).glob("[!.]*.*"):
            with contextlib.suppress(FileNotFoundError):  # a file written beside was renamed
                times.append(path.stat().st_mtime)
        return max(times)

    def _busy(self, begun: list[str]) -> bool:
        return _is_locked(self.folder / LOCK) or (
            bool(begun) and time.time() - self._written(begun[-1]) < RECENT_SECONDS
        )

    def _chosen(self, done: list[str], begun: list[str]) -> str:
        """The stage to show: the one asked for, else the last begun or done that trains; empty without any."""
        if self._only:
            return self._only
        training = [name for name in [*done, *begun] if self._rows(name, METRICS, name in begun)]
        return training[-1] if training else ""

    def _rows(self, name: str, record: str, begun: bool) -> list[Row]:
        draft = DRAFT_SUFFIX if begun else ""
        folder = self.folder / LOGS / name if record == TIMINGS else self.folder / f"{name}{draft}"
        path = folder / f"{record}.jsonl"
        return self._tails.setdefault(path, Tail(path)).look()

    def _training(self, name: str, begun: bool) -> Row:
        rows, times = self._rows(name, METRICS, begun), self._rows(name, TIMINGS, begun)
        losses, layers = self._rows(name, LOSSES, begun), self._rows(name, LAYERS, begun)
        about = self._about(name)
        last = rows[-1] if rows else {}
        done = int(last.get("step", -1)) + 1
        steps = int(about.get("steps", 0)) or done
        near = times[-RATE_STEPS:]
        each = statistics.median([row["seconds"] for row in near]) if near else 0.0
        rates = ("tokens_per_second", "flops_per_second", "mfu")
        return {
            "stage": _stage_of(name),
            "name": about.get("name", _stage_of(name)),
            "finished": not begun,
            "step": done,
            "steps": steps,
            "tokens": int(sum(row.get("tokens", 0) for row in rows)),
            "seconds_left": round(each * (steps - done), 1) if begun else 0.0,
            **{
                rate: statistics.median([row[rate] for row in near])
                for rate in rates
                if near and all(rate in row for row in near)
            },
            "metrics": {key: value for key, value in last.items() if key != "step"},
            "series": {
                key: squeezed(list(_series(rows, key)), POINTS)
                for key in last
                if key not in ("step", "tokens")
            },
            "losses": losses[-1] if losses else {},
            "layers": layers[-1] if layers else {},
        }

    def _about(self, name: str) -> Row:
        path = self.folder / LOGS / name / ABOUT
        return msgspec.json.decode(path.read_bytes(), type=Row) if path.is_file() else {}


def _series(rows: list[Row], key: str) -> Iterator[float]:
    values = (row.get(key) for row in rows)
    return (float(value) for value in values if value is not None and math.isfinite(value))


def _stage_of(name: str) -> str:
    found = FOLDER.fullmatch(name)
    return found["stage"] if found else name


def _stage_done(name: str, manifest: Manifest) -> Row:
    times = manifest.timings
    return {"stage": manifest.stage, "folder": name, "status": "done", "seconds": times.seconds}


def _is_locked(path: Path) -> bool:
    """Whether the process that last locked the folder is there; asking for the lock itself could keep a run out."""
    try:
        os.kill(int(path.read_text()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True
