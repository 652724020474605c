"""Progress of long work: silent by default, a live bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

MAX_SHOWN = 4
"""How many of the values given to `advance` fit beside a bar."""


class Track:
    """One piece of work under way; the silent form, and the parent of the visible ones."""

    def advance(self, n: float = 1, **shown: float | int | str) -> None:
        """`n` more units are done; `shown` are values to display beside them, such as `loss=2.31`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the display; called by `with`."""


class Progress:
    """Shows nothing. Any form of it crosses into another process as this silent one."""

    def track(self, description: str, total: float | None = None, unit: str = "step") -> Track:
        """Opens the display of `total` units of work (None: unknown), to be used with `with`."""
        return Track()

    def __reduce__(self) -> tuple[type["Progress"], tuple[()]]:
        return Progress, ()


class LineProgress(Progress):
    """Plain lines for logs and pipes, at most one in `every` seconds a track."""

    def __init__(self, stream: TextIO | None = None, every: float = 10.0) -> None:
        self._stream = stream
        self._every = every

    def track(self, description: str, total: float | None = None, unit: str = "step") -> Track:
        return _LineTrack(description, total, unit, self._stream or sys.stderr, self._every)


class _LineTrack(Track):
    def __init__(
        self, description: str, total: float | None, unit: str, stream: TextIO, every: float
    ) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._stream, self._every = stream, every
        self._done = 0.0
        self._start = self._last = time.monotonic()

    def advance(self, n: float = 1, **shown: float | int | str) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-9)
        parts = [f"{self._done:g}" + (f"/{self._total:g}" if self._total else "") + f" {self._unit}"]
        parts.append(f"{rate:.3g} {self._unit}/s")
        if self._total and rate > 0:
            parts.append(f"{max(self._total - self._done, 0) / rate:.0f} s left")
        parts.extend(shown_text(shown))
        self._stream.write(f"{self._description}: {', '.join(parts)}\n")
        self._stream.flush()


class RichProgress(Progress):
    """Live bars on a terminal's standard error, with rate and estimated time left."""

    def __init__(self) -> None:
        self._display: Any = None
        self._open = 0

    def track(self, description: str, total: float | None = None, unit: str = "step") -> Track:
        return _RichTrack(self, self._acquire(), description, total, unit)

    def _acquire(self) -> Any:
        if self._display is None:
            from rich import progress
            from rich.console import Console

            self._display = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.TextColumn("{task.fields[amount]}"),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(compact=True),
                progress.TextColumn("[dim]{task.fields[shown]}[/dim]"),
                console=Console(stderr=True),
                transient=True,
                refresh_per_second=4,
            )
            self._display.start()
        self._open += 1
        return self._display

    def release(self) -> None:
        """One track less; the display goes with the last one."""
        self._open -= 1
        if self._open == 0:
            self._display.stop()
            self._display = None


class _RichTrack(Track):
    def __init__(
        self, owner: RichProgress, display: Any, description: str, total: float | None, unit: str
    ) -> None:
        self._owner, self._display, self._unit, self._total = owner, display, unit, total
        self._done = 0.0
        self._start = time.monotonic()
        self._task = display.add_task(description, total=total, amount="", rate="", shown="")

    def advance(self, n: float = 1, **shown: float | int | str) -> None:
        self._done += n
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        fields: dict[str, str] = {"rate": f"{rate:.3g} {self._unit}/s"}
        fields["amount"] = f"{self._done:g}" + (f"/{self._total:g}" if self._total else "")
        if shown:
            fields["shown"] = "  ".join(shown_text(shown))
        self._display.update(self._task, advance=n, **fields)

    def close(self) -> None:
        self._display.remove_task(self._task)
        self._owner.release()


def shown_text(shown: dict[str, float | int | str]) -> list[str]:
    """`name value` for each of the first few values, numbers in four digits."""
    return [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in list(shown.items())[:MAX_SHOWN]
    ]
