"""`pensar report`: the report of a run, its tables in the terminal and its page in the browser."""

from pathlib import Path
from typing import Any

import msgspec

from pensar.base.errors import DataError
from pensar.base.manifest import artifacts_in
from pensar.cli.options import Flag
from pensar.cli.screen import Screen, score_cells
from pensar.report import write, write_report
from pensar.report.publish import FOLDER, NUMBERS, PAGE

HEADER = ("benchmark", "after stage", "mode", "score", "95% interval", "n")
RIGHT = (3, 4, 5)


def report(
    run: Path,
    /,
    *,
    out: Path | None = None,
    open: Flag = False,  # noqa: A002 - the flag is called --open
    json: Flag = False,
) -> None:
    """Draw the report of a run as it stands now; show where its page is and the table of scores.

    Parameters
    ----------
    run
        A run's folder. Where it holds no artifacts any more, the report that it holds is shown as it is.
    out
        Draw it into this folder instead of the run's `report`.
    open
        Open the page in the browser.
    json
        Print every number of the report as one JSON document.
    """
    with Screen(json) as screen:
        if out is not None:
            page = write_report(run, out)
        elif artifacts_in(run):
            page = write(run)
        else:
            page = run / FOLDER / PAGE
        if not page.exists():
            raise DataError(
                f"{run} holds no artifact of a run; run a recipe first, such as `pensar run recipes/tiny.yaml`"
            )
        document: dict[str, Any] = msgspec.json.decode(page.with_name(NUMBERS).read_bytes())
        screen.line(page.resolve().as_uri())
        rows = [
            (row["benchmark"], row["after_stage"], row["mode"], *score_cells(row))
            for row in document.get("stage_table", [])
        ]
        screen.table(HEADER, rows, RIGHT)
        screen.result(document)
        if open:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())
