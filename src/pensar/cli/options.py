"""Options and arguments that several verbs share, and what they open."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from pensar.base import torchrun
from pensar.base.errors import ConfigError
from pensar.base.identity import LOGS
from pensar.base.metrics import Recording
from pensar.base.pipeline import Choice
from pensar.base.ranks import Crew
from pensar.base.stage import Runtime, Stage
from pensar.cli.screen import progress_for_terminal

Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Json = Annotated[Flag, Parameter(help="Print one JSON document and nothing else.")]
ModelFolder = Annotated[Path, Parameter(help="A Qwen3-style Hugging Face directory.")]
RecipeFile = Annotated[Path, Parameter(help="The recipe's YAML file.")]
Repeated = Parameter(negative="", show_default=False)
"""Of a list: the option may be given again."""
Overrides = Annotated[list[str], Repeated, Parameter(name="--set")]


@Parameter(name="*")
@dataclass(frozen=True)
class RecipeOptions:
    """Which values, and where the run's folder stands."""

    set: Overrides = field(default_factory=list)
    """Change a value of the recipe: `--set data.filters.text.min_words=5`; may be given again."""
    root: Path = Path("runs")
    """Folder that holds the runs, one folder a recipe."""
    json: Json = False


@Parameter(name="*")
@dataclass(frozen=True)
class PartOptions:
    """Which part of a recipe, and how far what is done is trusted."""

    until: str | None = None
    """Stop after this stage."""
    from_: Annotated[str | None, Parameter(name="--from")] = None
    """Do this stage and all after it anew, even where they are done."""
    verify: Flag = False
    """Read every file of what is done and compare its digest."""


@Parameter(name="*")
@dataclass(frozen=True)
class MachineOptions:
    """Where the work is done; none of it changes what is made."""

    ranks: int | None = None
    """Processes that share the work; by default as the recipe says, without a recipe one a core, two at most."""
    threads: int | None = None
    """Threads of each process; by default as the recipe says, without a recipe one."""
    quiet: Flag = False
    """No progress bars."""
    profile: str = ""
    """Profile training: `--profile 100:3` the steps 100 to 102 of each stage, into its folder of logs."""


@dataclass(frozen=True)
class Opened:
    """A recipe, its stages and its folder."""

    path: Path
    options: RecipeOptions
    recipe: Any
    stages: Sequence[Stage]
    folder: Path

    def choice(self, part: PartOptions | None = None, only: tuple[str, ...] = ()) -> Choice:
        """What is asked of the pipeline: the part, or the stages in `only`, with what the recipe adopts."""
        part = part or PartOptions()
        adopt = {stage: Path(folder) for stage, folder in self.recipe.adopt.items()}
        return Choice(until=part.until, from_=part.from_, only=only, adopt=adopt, verify=part.verify)


def open_recipe(path: Path, options: RecipeOptions | None) -> Opened:
    """Loads a recipe with its overrides."""
    from pensar import recipe as recipes

    options = options or RecipeOptions()
    loaded = recipes.load(path, options.set)
    return Opened(path, options, loaded, recipes.stages(loaded), options.root / loaded.name)


@contextmanager
def open_runtime(
    options: MachineOptions | None,
    folder: Path,
    ranks: int,
    threads: int,
    layout: str = "",
    recording: Recording | None = None,
) -> Iterator[Runtime]:
    """The runtime of the options, `ranks` and `threads` where they say nothing; its processes end with the block."""
    options = options or MachineOptions()
    ranks = ranks if options.ranks is None else options.ranks
    threads = threads if options.threads is None else options.threads
    recording = recording or Recording()
    if options.profile:
        recording = replace(recording, profile=steps_to_profile(options.profile))
    with torchrun.TorchrunCrew(threads) if torchrun.launched() else Crew(ranks, threads) as crew:
        progress = progress_for_terminal(options.quiet)
        yield Runtime(logs=folder / LOGS, crew=crew, progress=progress, layout=layout, recording=recording)


def steps_to_profile(text: str) -> tuple[int, int]:
    """First step and number of steps of `100:3`; of `100` one step."""
    found = re.fullmatch(r"(\d+)(?::([1-9]\d*))?", text)
    if found is None:
        raise ConfigError(f"--profile {text}: give the first step and how many, such as 100:3")
    return int(found[1]), int(found[2] or 1)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
