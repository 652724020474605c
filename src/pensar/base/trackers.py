"""Trackers: services and files beside the record that show a run while it goes on, one adapter each.

`metrics.jsonl` is the record; a tracker is a view of it, opened when there is something to show and continued by every
later attempt. A run that goes back to a checkpoint computes the same steps again; a tracker that cannot take rows back
is not shown these a second time.
"""

import importlib
import importlib.util
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from pensar.base.config import nearest
from pensar.base.errors import ConfigError
from pensar.base.files import seed_of, write_atomic

STATE = "trackers.json"
"""In the log folder: each tracker's run, and the last step that it was shown."""


class Tracked(msgspec.Struct, kw_only=True):
    """How far a tracker has got with a stage."""

    run: str = ""
    """Its name for the stage's run; empty before it gave one."""
    step: int = -1
    """It was shown every step up to this one."""


class Tracker(Protocol):
    """An open tracker."""

    run: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows values of a step; several calls for one step add up."""
        ...

    def rewind(self, step: int) -> bool:
        """Takes back what was shown after `step`; False where that cannot be done."""
        ...

    def close(self) -> None: ...


class Trackers:
    """All trackers that a run is shown in; opened at the first row, so that a stage without rows opens none."""

    def __init__(self, names: Sequence[str], logs: Path) -> None:
        require(names)
        self._names, self._logs = names, logs
        self._open: dict[str, Tracker] = {}
        path = logs / STATE
        self._states: dict[str, Tracked] = {}
        if path.is_file():
            self._states = msgspec.json.decode(path.read_bytes(), type=dict[str, Tracked])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows values of a step to all that have not seen the step in an earlier attempt."""
        for name, tracker in self._opened().items():
            if step > self._states[name].step:
                tracker.log(step, values)

    def rewind(self, step: int, last: int) -> None:
        """Goes back to `step`; rows were shown up to step `last`."""
        if last <= step:
            return
        for name in self._names:
            state = self._states.get(name)
            if state is not None and not self._opened()[name].rewind(step):
                state.step = max(state.step, last)
        self._save()

    def close(self) -> None:
        for tracker in self._open.values():
            tracker.close()
        self._open = {}

    def _opened(self) -> dict[str, Tracker]:
        for name in self._names:
            if name not in self._open:
                state = self._states.setdefault(name, Tracked())
                tracker = TRACKERS[name](self._logs, state.run)
                self._open[name] = tracker
                if tracker.run != state.run:
                    state.run = tracker.run
                    self._save()
        return self._open

    def _save(self) -> None:
        if self._states:
            write_atomic(self._logs / STATE, msgspec.json.encode(self._states) + b"\n")


class TensorBoard:
    """Event files in the log folder; what was taken back stays in them, marked as such."""

    run = "tensorboard"

    def __init__(self, logs: Path, run: str) -> None:
        self._folder = logs / self.run
        self._writer: Any = None
        self._purge: int | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # Files are named by the second, and a run that goes back may be quicker.
            suffix = f".{len(list(self._folder.glob('events.*'))):04}"
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge, filename_suffix=suffix)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> bool:
        self.close()
        self._purge = step + 1
        return True

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """Weights & Biases; its own WANDB_MODE=offline keeps everything in the log folder."""

    def __init__(self, logs: Path, run: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        project, name = _names(logs)
        self.run = run or f"{seed_of(str(logs.absolute()), time.time_ns()):016x}"
        logs.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=self.run,
            resume="allow",
            dir=str(logs),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def rewind(self, step: int) -> bool:
        return False

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow; without MLFLOW_TRACKING_URI a database beside the run's logs."""

    def __init__(self, logs: Path, run: str) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        project, name = _names(logs)
        logs.mkdir(parents=True, exist_ok=True)
        uri = (
            mlflow.get_tracking_uri()
            if mlflow.is_tracking_uri_set()
            else f"sqlite:///{_home(logs)}/mlflow.db"
        )
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        self._metric = mlflow.entities.Metric
        if run:
            self._client.update_run(run, status="RUNNING")
            self.run = run
        else:
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            self.run = str(self._client.create_run(experiment, run_name=name).info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(_plain(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run, metrics=metrics)

    def rewind(self, step: int) -> bool:
        return False

    def close(self) -> None:
        self._client.set_terminated(self.run)


class Trackio:
    """trackio; a database of its own under TRACKIO_DIR."""

    def __init__(self, logs: Path, run: str) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        project, name = _names(logs)
        self.run = run or f"{name}-{seed_of(str(logs.absolute()), time.time_ns()):016x}"
        self._trackio.init(project=project, name=self.run, resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def rewind(self, step: int) -> bool:
        return False

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: Mapping[str, Callable[[Path, str], Tracker]] = MappingProxyType(
    {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow, "trackio": Trackio}
)


def require(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that there is not, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"runtime.trackers: {name!r} is no tracker; {nearest(name, list(TRACKERS))}. "
                f"There are {', '.join(TRACKERS)}"
            )
        package = "tensorboardX" if name == "tensorboard" else name
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"runtime.trackers names {name}, which is not installed; pip install {package}, or leave it out"
            )


def _names(logs: Path) -> tuple[str, str]:
    """The run's folder as project, the stage's as name: of `runs/tiny/logs/fusion-1a2b`, tiny and fusion-1a2b."""
    folder = logs.absolute()
    return folder.parent.parent.name or "pensar", folder.name


def _home(logs: Path) -> Path:
    """The folder of all stages' logs."""
    return logs.absolute().parent


def _plain(name: str) -> str:
    """A metric's name in the characters that every service takes."""
    return re.sub(r"[^\w./ -]", "_", name)
