"""`pensar eval`: a model on the benchmarks."""

from pathlib import Path
from typing import Annotated

from pensar.base.errors import ConfigError
from pensar.base.lineage import ancestors, open_artifact
from pensar.base.manifest import artifacts_in
from pensar.cli.options import Json, MachineOptions, ModelFolder, Repeated, open_runtime, usable_cores
from pensar.cli.screen import Screen, score_cells

PROBLEMS = "evaluation"
"""Folder of an artifact that holds the held-out problems."""
MAX_RANKS = 2
"""Two processes share the problems where there are cores for it; `--ranks` asks for more."""
HEADER = ("benchmark", "mode", "score", "95% interval", "n", "tokens")
RIGHT = (2, 3, 4, 5)


def evaluate(
    model: ModelFolder,
    /,
    *,
    tasks: Path | None = None,
    benchmark: Annotated[list[str] | None, Repeated] = None,
    limit: int | None = None,
    seed: int = 1,
    json: Json = False,
    machine: MachineOptions | None = None,
) -> None:
    """Score a model on the benchmarks, in both modes, with 95% confidence intervals.

    Parameters
    ----------
    tasks
        Folder of held-out problems; by default those of the run that made the model.
    benchmark
        Only this benchmark, such as `reasoning`; may be given again.
    limit
        At most this many problems of each benchmark.
    seed
        Seed of the draws.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; give at least 1")
    folder = open_artifact(model).folder
    problems = tasks if tasks is not None else _find_problems(folder)
    ranks = min(usable_cores(), MAX_RANKS)
    with Screen(json) as screen, open_runtime(machine, folder.parent, ranks, 1) as runtime:
        from pensar.evaluate.suite import evaluate_model

        screen.line(f"held-out problems: {problems}")
        rows = evaluate_model(
            model, problems, names=benchmark or (), limit=limit, seed=seed, crew=runtime.crew
        )
        cells = [(row["benchmark"], row["mode"], *score_cells(row), f"{row['tokens']:.1f}") for row in rows]
        screen.table(HEADER, cells, RIGHT)
        screen.result({"model": str(model), "tasks": str(problems), "scores": rows})


def _find_problems(model: Path) -> Path:
    """The problems in the model's lineage, or else in its run."""
    for artifact in [*ancestors(model), *artifacts_in(model.parent)]:
        if any((artifact.folder / PROBLEMS).glob("*.jsonl")):
            return artifact.folder
    raise ConfigError(
        f"neither the lineage of {model} nor its run holds held-out problems; name their folder with --tasks"
    )
