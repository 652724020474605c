"""What a verb shows: lines and tables for people, or one JSON document for machines."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from types import TracebackType
from typing import Any, Self

import msgspec

from pensar.base.progress import LineProgress, Progress, RichProgress


class Screen:
    """Standard output of one verb. With `json`, lines and tables vanish and stray prints go to standard error."""

    def __init__(self, json: bool) -> None:
        self._json = json
        self._stdout = sys.stdout
        self._redirect = redirect_stdout(sys.stderr) if json else None
        self._document: Any = None

    def __enter__(self) -> Self:
        if self._redirect is not None:
            self._redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._redirect is not None:
            self._redirect.__exit__(kind, error, trace)
            if error is None:
                data = msgspec.json.format(msgspec.json.encode(self._document, enc_hook=str), indent=2)
                print(data.decode("utf-8"), file=self._stdout, flush=True)

    def result(self, document: Any) -> None:
        """The JSON document of this verb; shown only with `--json`."""
        self._document = document

    def line(self, text: str = "") -> None:
        """One line for people."""
        if not self._json:
            print(text, file=self._stdout, flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
        """Columns as wide as their content, those in `right` aligned to the right; nothing without rows."""
        if not rows:
            return
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        for row in [header, *rows]:
            self.line(columns(row, widths, right))


def columns(row: Sequence[str], widths: Sequence[int], right: Sequence[int] = ()) -> str:
    """One line of a table."""
    cells = [
        text.rjust(width) if index in right else text.ljust(width)
        for index, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def progress_for_terminal(quiet: bool) -> Progress:
    """Live bars where standard error is a terminal, a line now and then where it is a file."""
    if quiet:
        return Progress()
    return RichProgress() if sys.stderr.isatty() else LineProgress()


def score_cells(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Score, 95% interval and number of trials of a row of the evaluation's scores."""
    return f"{row['score']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}", str(row["n"])


def counts_text(counts: dict[str, Any], limit: int = 4) -> str:
    """The first few plain values of a manifest's counts."""
    shown = []
    for name, value in counts.items():
        if isinstance(value, bool | dict | list) or value is None:
            continue
        shown.append(f"{name} {_value_text(value)}")
    return ", ".join(shown[:limit])


def _value_text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
