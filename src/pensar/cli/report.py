"""`pensar report`: the report of a run, its tables in the terminal and its page in the browser."""

from pathlib import Path
from typing import Any

import msgspec

from pensar.base.errors import DataError
from pensar.base.manifest import artifacts_in
from pensar.cli.options import Flag, Json
from pensar.cli.screen import Screen


def report(
    run: Path,
    /,
    *,
    out: Path | None = None,
    open: Flag = False,  # noqa: A002 - the flag is called --open
    json: Json = False,
) -> None:
    """Draw the report of a run as it stands now; show where its page is and the table of scores.

    Parameters
    ----------
    run
        A run's folder.
    out
        Draw it into this folder instead of the run's `report`.
    open
        Open the page in the browser.
    json
        Print every number of the report as one JSON document.
    """
    with Screen(json) as screen:
        folder = out if out is not None else run / "report"
        if out is not None:
            from pensar.report import write_report

            write_report(run, out)
        elif artifacts_in(run):
            from pensar.report import write

            write(run)
        page = folder / "index.html"
        if not page.exists():
            raise DataError(
                f"{run} holds no artifact of a run; run a recipe first, such as `pensar run recipes/tiny.yaml`"
            )
        document: dict[str, Any] = msgspec.json.decode((folder / "report.json").read_bytes())
        screen.line(f"{page.resolve().as_uri()}")
        rows = [_score(row) for row in document.get("stage_table", [])]
        screen.table(
            ("benchmark", "after stage", "mode", "score", "95% interval", "n"), rows, right=(3, 4, 5)
        )
        screen.result(document)
        if open:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())


def _score(row: dict[str, Any]) -> list[str]:
    interval = f"{row['low']:.3f} - {row['high']:.3f}"
    return [row["benchmark"], row["after_stage"], row["mode"], f"{row['score']:.3f}", interval, str(row["n"])]
