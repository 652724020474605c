"""A stage: a named function from configuration and input folders to the files of one artifact.

Identity (name, revision, configuration, inputs) and execution (`Runtime`) never share a struct: only identity
is hashed, so the same recipe on another machine is the same work.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pensar.base.config import Config
from pensar.base.metrics import Recording
from pensar.base.progress import Progress
from pensar.base.ranks import Crew

Counts = dict[str, Any]
"""What a stage reports of its own work for the manifest: plain JSON, no timings."""


@dataclass(frozen=True)
class Runtime:
    """Where and how a stage runs. Never hashed, never written into an artifact."""

    logs: Path
    """Folder for everything that may differ between two identical runs: timings, log text, TensorBoard events."""
    crew: Crew = field(default_factory=Crew)
    """The processes that share the work; one by default."""
    progress: Progress = field(default_factory=Progress)
    layout: str = ""
    """How pre-training spreads a model over the crew's ranks, as in `shard=4,tp=2`; empty: every rank has all of it."""
    recording: Recording = field(default_factory=Recording)
    """In what trackers training is shown, and which of its steps are profiled."""


StageFunction = Callable[[Any, Mapping[str, Path], Path, Runtime], Counts]
"""`run(config, inputs, out, runtime)`: fills `out`, may find a crashed attempt's files there and goes on from them."""


@dataclass(frozen=True)
class Stage:
    """One box of the pipeline."""

    name: str
    run: StageFunction
    config: Config
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Role -> name of the stage whose artifact plays it; the function sees role -> folder."""
    outside: tuple[Path, ...] = ()
    """Files and folders beyond the run that this stage reads; their digests join its fingerprint."""
    revision: int = 1
    """Bumped by hand when the function's meaning changes."""
