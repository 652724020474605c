"""Averages of the weights over a stage, which take the place of its last weights at the end."""

from typing import Any

import torch
from torch import Tensor, nn

from pensar.base.config import Config
from pensar.base.errors import ConfigError


class AverageConfig(Config, frozen=True, kw_only=True):
    """Which average is the stage's model; without any it is the last step's weights."""

    ema: float = 0.0
    """Decay per step of an exponential moving average: 0.99 looks back about a hundred steps."""
    checkpoints: int = 0
    """How many of the last checkpoints the mean is taken of, the stage's end among them."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1 or self.checkpoints < 0:
            raise ConfigError(
                f"average: ema {self.ema} is in [0, 1), checkpoints {self.checkpoints} at least 0; 0 switches it off"
            )
        if self.ema and self.checkpoints:
            raise ConfigError(
                f"average: ema {self.ema} and checkpoints {self.checkpoints} are two models; set one of them to 0"
            )


class Average:
    """The running mean of the weights w_s over the steps or checkpoints so far, at least in float32.

    Exponential: sum_s d^(n-s) w_s / sum_s d^(n-s), so that the weights before the first step have no part in it.
    It costs the memory of one more copy of the weights; the mean of checkpoints only from the first of them on.
    """

    def __init__(self, model: nn.Module, config: AverageConfig, steps: int, checkpoint_every: int) -> None:
        self.config = config
        self._model = model
        self._steps = steps
        self._every = checkpoint_every
        self._num = 0
        self._mean: dict[str, Tensor] = {}

    def update(self, done: int) -> None:
        """Takes in the weights after `done` steps, where they are part of the average."""
        if self.config.ema:
            self._add((1 - self.config.ema) / (1 - self.config.ema ** (self._num + 1)))
        elif self._later_checkpoints(done) < self.config.checkpoints:
            self._add(1 / (self._num + 1))

    def apply(self) -> None:
        """Gives the model the average, where there is one."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if name in self._mean:
                    parameter.copy_(self._mean[name])

    def state_dict(self) -> dict[str, Any]:
        return {"num": self._num, "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        devices = {name: parameter.device for name, parameter in self._model.named_parameters()}
        self._num = int(state["num"])
        self._mean = {name: mean.to(devices[name], copy=True) for name, mean in state["mean"].items()}

    def _later_checkpoints(self, done: int) -> float:
        """How many checkpoints come after this one, the end among them; infinite where `done` is none."""
        if done == self._steps:
            return 0
        if done % self._every:
            return float("inf")
        return 1 + (self._steps - 1) // self._every - done // self._every

    @torch.no_grad()
    def _add(self, weight: float) -> None:
        """mean += weight (parameters - mean), of what is trained."""
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            now = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            if name in self._mean:
                self._mean[name].lerp_(now, weight)
            else:
                self._mean[name] = now.clone()
        self._num += 1
