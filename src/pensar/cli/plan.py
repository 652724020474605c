"""`pensar plan`: the verdict on every stage, why, and what the rest will cost; of a size, the plan for a cluster."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from pensar.base import pipeline
from pensar.base.errors import ConfigError
from pensar.base.pipeline import Planned
from pensar.cli.options import PartOptions, RecipeOptions, open_recipe
from pensar.cli.plan_size import ClusterOptions, is_size, plan_size
from pensar.cli.screen import Screen
from pensar.report.numbers import duration, short, size

if TYPE_CHECKING:
    from pensar.estimates import StageCost

HEADER = ("stage", "status", "tokens", "FLOPs", "memory", "time", "why")
RIGHT = (2, 3, 4, 5)


RecipeOrSize = Annotated[Path, Parameter(help="The recipe's YAML file, or a model size such as 30b-a3b.")]


def plan(
    recipe: RecipeOrSize,
    /,
    *,
    part: PartOptions | None = None,
    options: RecipeOptions | None = None,
    cluster: ClusterOptions | None = None,
) -> None:
    """Say for each stage whether it is done, stale or new and why, with the estimated cost; runs nothing.

    Of a model size it says how a cluster would train it.
    """
    if is_size(recipe):
        _refuse_recipe_options(part, options)
        plan_size(str(recipe), cluster or ClusterOptions(), options is not None and options.json)
        return
    if cluster and cluster.given():
        raise ConfigError(
            f"{', '.join(cluster.given())} with the recipe {recipe}: they are for a size, such as 30b-a3b"
        )
    from pensar import recipe as recipes

    opened = open_recipe(recipe, options)
    with Screen(opened.options.json) as screen:
        planned = pipeline.plan(opened.stages, opened.folder, opened.choice(part))
        estimates = recipes.estimates(opened.recipe)
        screen.table(HEADER, [_row(item, estimates.get(item.name)) for item in planned], RIGHT)
        total = _total(planned, estimates)
        screen.line(
            f"to do: {total['stages']} of {len(planned)} stages, {short(total['tokens'])} tokens, "
            f"{short(total['flops'])} FLOPs, {size(total['memory_bytes'])} at most, "
            f"about {duration(total['seconds'])}"
        )
        stages = [_document(item, estimates.get(item.name)) for item in planned]
        screen.result({"recipe": str(recipe), "folder": str(opened.folder), "stages": stages, "to_do": total})


def _refuse_recipe_options(part: PartOptions | None, options: RecipeOptions | None) -> None:
    """Options that say something about a recipe's stages say nothing about a size."""
    if (part or PartOptions()) != PartOptions() or (options and options.set):
        raise ConfigError("--set, --until, --from and --verify are for a recipe; leave them out for a size")


def to_do(item: Planned) -> bool:
    """Whether a run would do the stage."""
    return item.status in ("new", "stale")


def _row(item: Planned, cost: "StageCost | None") -> tuple[str, ...]:
    amounts = ("", "", "", "")
    if cost is not None and to_do(item):
        amounts = (
            short(cost.tokens) if cost.tokens else "",
            short(cost.flops) if cost.flops else "",
            size(cost.memory_bytes) if cost.memory_bytes else "",
            duration(cost.seconds) if cost.seconds else "",
        )
    return (item.name, item.status, *amounts, item.reason)


def _total(planned: Sequence[Planned], estimates: Mapping[str, "StageCost"]) -> dict[str, float]:
    todo = [item for item in planned if to_do(item)]
    costs = [estimates[item.name] for item in todo if item.name in estimates]
    return {
        "stages": len(todo),
        "tokens": sum(cost.tokens for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "memory_bytes": max((cost.memory_bytes for cost in costs), default=0),
        "seconds": sum(cost.seconds for cost in costs),
    }


def _document(item: Planned, cost: "StageCost | None") -> dict[str, Any]:
    return {
        "name": item.name,
        "status": item.status,
        "reason": item.reason,
        "fingerprint": item.fingerprint,
        "folder": str(item.folder),
        "estimate": None if cost is None else msgspec.structs.asdict(cost),
    }
