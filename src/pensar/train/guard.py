"""The guard of a training run: what makes a step bad, and which data is left out because of it.

A step is judged by values that all ranks share, after its gradients are summed and before the parameters change.
The data of an optimiser step are those of a data step; the two numbers part where data steps were skipped, so that a
stage takes all its optimiser steps and its learning-rate schedule whatever its data.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from pensar.base.config import Config
from pensar.base.errors import ConfigError, RunError
from pensar.base.files import write_atomic

WATCHED = ("loss", "divergence", "gradient_norm")
"""The metrics whose spikes count; a policy-gradient loss has no level to spike from."""
FLOOR = 1e-3
"""Least robust deviation, as a share of the median: a window of equal values has none of its own."""
_FILE = "skipped.json"


class GuardConfig(Config, frozen=True, kw_only=True):
    """What to do about a step that would harm the model."""

    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    """`skip` takes the same optimiser step with the next data; `rewind` goes back to the last checkpoint and leaves
    out all data from there to the bad step (PaLM, arXiv 2204.02311, section 5.1)."""
    spike_sigma: float = 0.0
    """Robust deviations above the window's median at which a loss or gradient norm is a spike; 0: only what is not
    finite is bad."""
    window: int = 128
    """Good steps that spikes are measured against; judged from half a window on."""
    limit: int = 10
    """Bad steps that a stage may leave behind; the next one stops it."""

    def __post_init__(self) -> None:
        if self.spike_sigma < 0 or self.window < 2 or self.limit < 0:
            raise ConfigError(
                f"guard: spike_sigma {self.spike_sigma}, window {self.window}, limit {self.limit}: "
                "spike_sigma and limit are at least 0, window at least 2 steps"
            )


class BadStep(RunError):
    """A step whose update was refused; the parameters are those before it."""

    @property
    def reason(self) -> str:
        """What was found, without the advice."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.reason}; lower the learning rate or look at the batch's data"


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """Data steps `first` to `last` that were left out because optimiser step `step` was bad."""

    step: int
    back_to: int
    """Optimiser step that training went on from; `step` itself unless it was rewound."""
    first: int
    last: int
    reason: str


class Guard:
    """Judges steps, and maps optimiser steps to data steps; its state is that of the checkpoint that holds it."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped: list[Skipped] = []
        self._windows: dict[str, list[float]] = {}

    def judge(self, metrics: Mapping[str, float]) -> None:
        """Raises BadStep when the step must not be taken, else remembers its values."""
        refuse_not_finite(metrics)
        if not self.config.spike_sigma:
            return
        watched = {name: metrics[name] for name in WATCHED if name in metrics}
        for name, value in watched.items():
            self._refuse_spike(name, value)
        for name, value in watched.items():
            self._windows[name] = [*self._windows.get(name, []), value][-self.config.window :]

    def data_step(self, step: int) -> int:
        """The data step of an optimiser step: the `step`-th of those that were not skipped."""
        for gap in sorted(self.skipped, key=lambda gap: gap.first):
            if gap.first <= step:
                step += gap.last - gap.first + 1
        return step

    def skip(self, back_to: int, step: int, bad: BadStep) -> None:
        """Leaves out the data of optimiser steps `back_to` to `step`; raises RunError beyond the limit."""
        if len(self.skipped) >= self.config.limit:
            raise RunError(
                f"step {step} is bad after {len(self.skipped)} others that were left behind, the limit of this "
                f"stage: {bad}, or raise guard.limit"
            ) from bad
        gap = Skipped(
            step=step,
            back_to=back_to,
            first=self.data_step(back_to),
            last=self.data_step(step),
            reason=bad.reason,
        )
        self.skipped.append(gap)

    @classmethod
    def of(cls, config: GuardConfig, folder: Path) -> "Guard":
        """The guard of a finished stage, as far as its artifact tells: what was skipped."""
        guard = cls(config)
        path = folder / _FILE
        if path.exists():
            guard.skipped = msgspec.json.decode(path.read_bytes(), type=list[Skipped])
        return guard

    def write(self, folder: Path) -> None:
        """Writes what was skipped so far as skipped.json; no file where nothing was."""
        if self.skipped:
            write_atomic(folder / _FILE, msgspec.json.format(msgspec.json.encode(self.skipped)) + b"\n")
        else:
            (folder / _FILE).unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"windows": dict(self._windows), "skipped": msgspec.to_builtins(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._windows = dict(state["windows"])
        self.skipped = msgspec.convert(state["skipped"], list[Skipped])

    def _refuse_spike(self, name: str, value: float) -> None:
        window = self._windows.get(name, [])
        if len(window) < self.config.window // 2:
            return
        median = float(np.median(window))
        deviation = 1.4826 * float(np.median(np.abs(np.asarray(window) - median)))
        deviation = max(deviation, FLOOR * abs(median), math.ulp(1.0))
        if value - median > self.config.spike_sigma * deviation:
            raise BadStep(
                f"{name} {value:.6g} is {(value - median) / deviation:.3g} robust deviations above the median "
                f"{median:.6g} of the last {len(window)} steps, more than guard.spike_sigma "
                f"{self.config.spike_sigma:g}"
            )


def refuse_not_finite(metrics: Mapping[str, float]) -> None:
    """Raises BadStep when a step's loss or its gradient's norm is not finite."""
    odd = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if set(odd) == {"gradient_norm"}:
        raise BadStep(f"the gradient's norm is {odd['gradient_norm']}")
    if odd:
        raise BadStep(
            f"the loss is not finite ({', '.join(f'{name} {value}' for name, value in odd.items())})"
        )
