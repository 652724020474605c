"""`pensar plan`: the verdict on every stage, why, and what the rest will cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from pensar.base import pipeline
from pensar.base.pipeline import Planned
from pensar.cli.options import Flag, RecipeOptions, open_recipe
from pensar.cli.screen import Screen, bytes_text, number_text, seconds_text

HEADER = ("stage", "status", "tokens", "FLOPs", "memory", "time", "why")
RIGHT = (2, 3, 4, 5)


def plan(
    recipe: Path,
    /,
    *,
    until: str | None = None,
    from_: Annotated[str | None, Parameter(name="--from")] = None,
    verify: Flag = False,
    options: RecipeOptions | None = None,
) -> None:
    """Say for each stage whether it is done, stale or new and why, with the estimated cost; runs nothing.

    Parameters
    ----------
    recipe
        The recipe's YAML file.
    until
        Stop after this stage.
    from_
        As if this stage and all after it were to be done anew.
    verify
        Read every file of what is done and compare its digest.
    """
    from pensar import recipe as recipes

    options = options or RecipeOptions()
    with Screen(options.json) as screen:
        opened = open_recipe(recipe, options)
        choice = opened.choice(until=until, from_=from_, verify=verify)
        planned = pipeline.plan(opened.stages, opened.folder, choice)
        estimates = recipes.estimates(opened.recipe)
        screen.table(HEADER, [_row(item, estimates.get(item.name)) for item in planned], RIGHT)
        total = _total(planned, estimates)
        screen.line(
            f"to do: {total['stages']} of {len(planned)} stages, {number_text(total['tokens'])} tokens, "
            f"{number_text(total['flops'])} FLOPs, {bytes_text(total['memory_bytes'])} at most, "
            f"about {seconds_text(total['seconds'])}"
        )
        stages = [_document(item, estimates.get(item.name)) for item in planned]
        screen.result({"recipe": str(recipe), "folder": str(opened.folder), "stages": stages, "to_do": total})


def _to_do(item: Planned) -> bool:
    return item.status in ("new", "stale")


def _row(item: Planned, estimate: Any) -> tuple[str, ...]:
    cost = ("", "", "", "")
    if estimate is not None and _to_do(item):
        cost = (
            number_text(estimate.tokens) if estimate.tokens else "",
            number_text(estimate.flops) if estimate.flops else "",
            bytes_text(estimate.memory_bytes) if estimate.memory_bytes else "",
            seconds_text(estimate.seconds) if estimate.seconds else "",
        )
    return (item.name, item.status, *cost, item.reason)


def _total(planned: Sequence[Planned], estimates: Mapping[str, Any]) -> dict[str, float]:
    todo = [item for item in planned if _to_do(item)]
    costs = [estimates[item.name] for item in todo if item.name in estimates]
    return {
        "stages": len(todo),
        "tokens": sum(cost.tokens for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "memory_bytes": max((cost.memory_bytes for cost in costs), default=0),
        "seconds": sum(cost.seconds for cost in costs),
    }


def _document(item: Planned, estimate: Any) -> dict[str, Any]:
    return {
        "name": item.name,
        "status": item.status,
        "reason": item.reason,
        "fingerprint": item.fingerprint,
        "folder": str(item.folder),
        "estimate": None
        if estimate is None
        else {name: getattr(estimate, name) for name in ("tokens", "flops", "memory_bytes", "seconds")},
    }
