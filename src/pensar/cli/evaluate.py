"""`pensar eval`: a model on the benchmarks."""

from pathlib import Path

from pensar.base.errors import ConfigError
from pensar.base.lineage import ancestors, open_artifact
from pensar.base.manifest import artifacts_in
from pensar.cli.options import Json, MachineOptions, open_runtime, usable_cores
from pensar.cli.screen import Screen

PROBLEMS = "evaluation"
"""Folder of an artifact that holds the held-out problems."""
MAX_RANKS = 2
"""Two processes share the problems where there are cores for it; `--ranks` asks for more."""


def evaluate(
    model: Path,
    /,
    *,
    tasks: Path | None = None,
    benchmark: list[str] | None = None,
    limit: int | None = None,
    seed: int = 1,
    json: Json = False,
    machine: MachineOptions | None = None,
) -> None:
    """Score a model on the benchmarks, in both modes, with 95% confidence intervals.

    Parameters
    ----------
    model
        A Qwen3-style Hugging Face directory.
    tasks
        Folder of held-out problems; by default those of the run that made the model.
    benchmark
        Only this benchmark; may be given again.
    limit
        At most this many problems of each benchmark.
    seed
        Of the draws.
    json
        Print one JSON document and nothing else.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; give at least 1")
    folder = open_artifact(model).folder
    problems = tasks if tasks is not None else _find_problems(folder)
    ranks = min(usable_cores(), MAX_RANKS)
    with (
        Screen(json) as screen,
        open_runtime(machine or MachineOptions(), folder.parent, ranks, 1) as runtime,
    ):
        from pensar.evaluate.suite import evaluate_model

        screen.line(f"held-out problems: {problems}")
        rows = evaluate_model(
            model, problems, names=benchmark or (), limit=limit, seed=seed, crew=runtime.crew
        )
        header = list(dict.fromkeys(name for row in rows for name in row))
        right = [
            index
            for index, name in enumerate(header)
            if any(isinstance(row.get(name), float) for row in rows)
        ]
        screen.table(header, [[_cell(row.get(name)) for name in header] for row in rows], right)
        screen.result({"model": str(model), "tasks": str(problems), "scores": rows})


def _find_problems(model: Path) -> Path:
    """The problems in the model's lineage, or else in its run."""
    for artifact in [*ancestors(model), *artifacts_in(model.parent)]:
        if any((artifact.folder / PROBLEMS).glob("*.jsonl")):
            return artifact.folder
    raise ConfigError(
        f"neither the lineage of {model} nor its run holds held-out problems; name their folder with --tasks"
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
