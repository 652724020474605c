"""Ending a stage in the middle of its training."""

from types import ModuleType
from typing import Any

import pytest


class Killed(Exception):
    """Stands for whatever ends a process."""


def at_step(patch: pytest.MonkeyPatch, module: ModuleType, call: int) -> None:
    """Makes the module's `train_step` raise at its `call`-th call, counted from 0, once the others have run."""
    whole = module.train_step
    calls = iter(range(call + 1))

    def train_step(*arguments: Any, **named: Any) -> dict[str, float]:
        if next(calls) == call:
            raise Killed
        values: dict[str, float] = whole(*arguments, **named)
        return values

    patch.setattr(module, "train_step", train_step)
