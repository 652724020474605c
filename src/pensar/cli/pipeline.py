"""`pensar run`, `data`, `tokenizer` and `train`: the stages of a recipe, all or a part of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pensar.base.config import nearest
from pensar.base.errors import ConfigError
from pensar.base.metrics import Recording
from pensar.base.pipeline import Choice, Outcome, execute, plan
from pensar.cli.options import (
    MachineOptions,
    Opened,
    PartOptions,
    RecipeFile,
    RecipeOptions,
    open_recipe,
    open_runtime,
)
from pensar.cli.plan import to_do
from pensar.cli.screen import Screen, columns, counts_text
from pensar.report.numbers import duration, size
from pensar.report.publish import FOLDER as REPORT

WIDTHS = (8, 18, 14, 10, 0)
"""Fixed, since each line is shown as soon as its stage is done."""
HEADER = ("", "stage", "time", "memory", "counts")
RIGHT = (2, 3)


def run(
    recipe: RecipeFile,
    /,
    *,
    part: PartOptions | None = None,
    options: RecipeOptions | None = None,
    machine: MachineOptions | None = None,
) -> None:
    """Run a recipe from raw documents to an evaluated model and its report.

    Stages that are done are kept; an interrupted run goes on where it stopped.
    """
    opened = open_recipe(recipe, options)
    _run(opened, opened.choice(part), machine)


def data(
    recipe: RecipeFile, /, *, options: RecipeOptions | None = None, machine: MachineOptions | None = None
) -> None:
    """Run the data stages of a recipe: from the sources to the mixture, and the problem sets."""
    _run_group("data", recipe, options, machine)


def tokenizer(
    recipe: RecipeFile, /, *, options: RecipeOptions | None = None, machine: MachineOptions | None = None
) -> None:
    """Run the tokenizer and token shard stages of a recipe, and what they need."""
    _run_group("tokenizer", recipe, options, machine)


def train(
    recipe: RecipeFile,
    /,
    *,
    stage: str | None = None,
    options: RecipeOptions | None = None,
    machine: MachineOptions | None = None,
) -> None:
    """Run the training stages of a recipe, or one of them, and what they need.

    Parameters
    ----------
    stage
        Only this stage, and what it needs.
    """
    _run_group("train", recipe, options, machine, stage)


def _run_group(
    group: str,
    path: Path,
    options: RecipeOptions | None,
    machine: MachineOptions | None,
    stage: str | None = None,
) -> None:
    from pensar import recipe as recipes

    opened = open_recipe(path, options)
    # A stage can be out of the pipeline, such as the demonstration's where the user has sources.
    present = {item.name for item in opened.stages}
    names = [name for name in recipes.GROUPS[group] if name in present]
    if stage is not None and stage not in names:
        raise ConfigError(f"`{stage}` is no stage of {group}; {nearest(stage, names)}")
    only = tuple(names) if stage is None else (stage,)
    _run(opened, opened.choice(only=only), machine)


def _run(opened: Opened, choice: Choice, machine: MachineOptions | None) -> None:
    from pensar import recipe as recipes

    links = recipes.links(opened.recipe)
    wanted = opened.recipe.runtime
    recording = Recording(trackers=wanted.trackers, profile=wanted.profile_steps)
    within = open_runtime(machine, opened.folder, wanted.ranks, wanted.threads, wanted.layout, recording)
    with Screen(opened.options.json) as screen, within as runtime:
        todo = [item for item in plan(opened.stages, opened.folder, choice) if to_do(item)]
        crew = runtime.crew
        screen.line(
            f"{opened.folder}: stages to do {len(todo)}, processes {crew.ranks}, threads of each {crew.threads}"
        )
        for item in todo:
            if item.reason.startswith("damaged"):
                screen.line(
                    f"{item.name} is {item.reason}; it is done anew, the damaged folder is kept beside it"
                )
        screen.line(columns(HEADER, WIDTHS, RIGHT))
        outcomes = []
        for outcome in execute(opened.stages, opened.folder, runtime, choice, links):
            outcomes.append(outcome)
            screen.line(columns(_row(outcome), WIDTHS, RIGHT))
        if choice.until is None and not choice.only:
            from pensar.report import write

            write(opened.folder, [outcome.planned.folder for outcome in outcomes])
        _say_next_steps(screen, opened, outcomes, links)
        screen.result(_document(opened, outcomes, links))


def _row(outcome: Outcome) -> tuple[str, str, str, str, str]:
    status, name = _status(outcome), outcome.planned.name
    if outcome.manifest is None or outcome.planned.status == "adopted":
        return status, name, "", "", str(outcome.planned.folder)
    times = outcome.manifest.timings
    counts = counts_text(outcome.manifest.counts)
    return status, name, duration(times.seconds), size(times.peak_memory_bytes), counts


def _status(outcome: Outcome) -> str:
    return "ran" if outcome.ran else outcome.planned.status


def _say_next_steps(
    screen: Screen, opened: Opened, outcomes: Sequence[Outcome], links: Mapping[str, str]
) -> None:
    ran = [outcome.manifest for outcome in outcomes if outcome.ran and outcome.manifest]
    spent = sum(manifest.timings.seconds for manifest in ran)
    screen.line(f"stages run: {len(ran)} in {duration(spent)}; done before: {len(outcomes) - len(ran)}")
    steps = []
    if "model" in links and (opened.folder / "model").exists():
        steps += [f"pensar chat {opened.folder / 'model'}", f"pensar serve {opened.folder / 'model'}"]
    if (opened.folder / REPORT).exists():
        steps.append(f"pensar report {opened.folder}")
    screen.line("next:")
    for step in [*steps, f"pensar plan {opened.path}"]:
        screen.line(f"  {step}")


def _document(opened: Opened, outcomes: Sequence[Outcome], links: Mapping[str, str]) -> dict[str, Any]:
    return {
        "recipe": str(opened.path),
        "folder": str(opened.folder),
        "stages": [
            {
                "name": outcome.planned.name,
                "status": _status(outcome),
                "fingerprint": outcome.planned.fingerprint,
                "folder": str(outcome.planned.folder),
                "counts": outcome.manifest.counts if outcome.manifest else None,
                "timings": outcome.manifest.timings if outcome.manifest else None,
            }
            for outcome in outcomes
        ],
        "links": {
            link: str(opened.folder / link) for link in (*links, REPORT) if (opened.folder / link).exists()
        },
    }
