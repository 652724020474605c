"""Learning-rate schedules: warm-up, stable, decay (WSD), cosine, constant; all as factors of the peak."""

import math
from typing import Literal

from pensar.base.config import Config


class ScheduleConfig(Config, frozen=True, kw_only=True):
    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly."""
    decay: float = 0.2
    """WSD: share of the steps at the end over which the rate falls linearly."""
    start: float = 1.0
    """WSD: rate at the beginning of the stable part, for a stage that goes on where another stopped."""
    final: float = 0.0
    """Rate at the last step, as a share of the peak."""


def rate(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Factor of the peak learning rate at `step` of `num_steps`; never exactly zero before the end."""
    done = (step + 1) / max(num_steps, 1)
    if done < schedule.warmup:
        return schedule.start * done / schedule.warmup
    if schedule.kind == "constant":
        return schedule.start
    if schedule.kind == "cosine":
        share = (done - schedule.warmup) / max(1 - schedule.warmup, 1e-9)
        return schedule.final + (schedule.start - schedule.final) * 0.5 * (1 + math.cos(math.pi * share))
    if not schedule.decay:
        return schedule.start
    left = (1 - done) / schedule.decay
    return schedule.final + (schedule.start - schedule.final) * min(1.0, left + 1 / max(num_steps, 1))
