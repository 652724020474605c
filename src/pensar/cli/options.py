"""Options that the verbs on recipes share, and what they open."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from pensar.base.pipeline import Choice
from pensar.base.ranks import Crew
from pensar.base.stage import Runtime, Stage
from pensar.cli.screen import progress_for_terminal

Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Json = Flag
Overrides = Annotated[list[str], Parameter(name="--set", negative="", show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True)
class RecipeOptions:
    """Which values, and where the run's folder stands."""

    set: Overrides = field(default_factory=list)
    """Change a value of the recipe: `--set data.min_words=5`; may be given again."""
    root: Path = Path("runs")
    """Folder that holds the runs, one folder a recipe."""
    json: Json = False
    """Print one JSON document and nothing else."""


@Parameter(name="*")
@dataclass(frozen=True)
class MachineOptions:
    """Where the work is done; none of it changes what is made."""

    ranks: int | None = None
    """Processes that share the work; what the recipe says by default."""
    threads: int | None = None
    """Threads of each process; what the recipe says by default."""
    device: str = "cpu"
    """Where tensors live."""
    quiet: Flag = False
    """No progress bars."""


@dataclass(frozen=True)
class Opened:
    """A recipe, its stages and its folder."""

    path: Path
    recipe: Any
    stages: Sequence[Stage]
    folder: Path

    def choice(self, **wanted: Any) -> Choice:
        """A choice among the stages, with what the recipe adopts."""
        adopt = {stage: Path(folder) for stage, folder in dict(self.recipe.adopt).items()}
        return Choice(adopt=adopt, **wanted)


def open_recipe(path: Path, options: RecipeOptions) -> Opened:
    """Loads a recipe with its overrides."""
    from pensar import recipe as recipes

    loaded = recipes.load(path, options.set)
    return Opened(path, loaded, recipes.stages(loaded), options.root / loaded.name)


@contextmanager
def open_runtime(options: MachineOptions, folder: Path, ranks: int, threads: int) -> Iterator[Runtime]:
    """The runtime of the options, `ranks` and `threads` where they say nothing; its processes end with the block."""
    ranks = ranks if options.ranks is None else options.ranks
    threads = threads if options.threads is None else options.threads
    with Crew(ranks=ranks, threads=threads) as crew:
        progress = progress_for_terminal(options.quiet)
        yield Runtime(logs=folder / "logs", crew=crew, progress=progress, device=options.device)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
