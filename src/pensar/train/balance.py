"""Balance: how evenly the experts of a sparse model share the tokens of one step, over all ranks and micro-batches."""

import math
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from pensar.base.files import write_atomic
from pensar.base.ranks import World
from pensar.model.config import ModelConfig
from pensar.model.moe import Routing, balance_loss, expert_counts, router_z_loss

LAST = 10
"""The last such part of a stage's steps is what experts.json shows."""


class Balance:
    """The assignments of a step, and the router's losses over the global batch (arXiv 2501.11873).

    The gradient of the load-balancing loss is the whole batch's only if the expert shares are. With one micro-batch a
    step they are those of its own forward pass, summed over the ranks. With several, `settle` takes the counts of a
    pass made beforehand; without it each micro-batch's shares are those of the step up to and with itself.
    """

    def __init__(
        self, config: ModelConfig, num_tokens: int, world: World, device: torch.device | str = "cpu"
    ) -> None:
        self.counts_LE = torch.zeros(config.num_layers, config.num_experts, device=device)
        """Over all ranks, of the whole step once its last micro-batch is through."""
        self.num_tokens = float(num_tokens)
        """Of the whole step, over all ranks, without padding."""
        self._world = world
        self._settled = False

    def settle(self, counts_LE: Tensor) -> None:
        """Takes the assignments of all this rank's micro-batches; every rank must come here once."""
        self._add(counts_LE)
        self._settled = True

    def loss(self, layers: list[Routing], real_N: Tensor) -> Tensor:
        """This rank's part of the loss of one micro-batch; the parts of ranks and micro-batches add up.

        `real_N` is False for padding. Every rank must come here or to `absent` once for each micro-batch.
        """
        if not self._settled:
            self._add(expert_counts(layers, real_N))
        return balance_loss(layers, self.counts_LE, num_tokens=self.num_tokens, real_N=real_N)

    def z_loss(self, layers: list[Routing], real_N: Tensor) -> Tensor:
        """This rank's part of the router z-loss of one micro-batch; the parts add up."""
        return router_z_loss(layers, num_tokens=self.num_tokens, real_N=real_N)

    def absent(self) -> None:
        """What a rank does that has no rows of a micro-batch: the others wait for its zeros."""
        if not self._settled:
            self._add(torch.zeros_like(self.counts_LE))

    def metrics(self) -> dict[str, float]:
        """Of the step's assignments: the largest overload of an expert in any layer (max_e f_e E - 1, the MaxVio of
        arXiv 2408.15664), the mean over layers of the shares' entropy over its maximum, and how many experts of all
        layers got no token."""
        share_LE = shares(self.counts_LE)
        num_experts = share_LE.shape[1]
        entropy_L = torch.special.entr(share_LE).sum(-1)
        return {
            "expert_overload": float(share_LE.max()) * num_experts - 1,
            "expert_entropy": float(entropy_L.mean()) / math.log(num_experts) if num_experts > 1 else 1.0,
            "dead_experts": float((self.counts_LE == 0).sum()),
        }

    def _add(self, counts_LE: Tensor) -> None:
        self.counts_LE = self.counts_LE + self._world.all_reduce_(counts_LE)


class ExpertUse:
    """The assignments of a stage's last steps, summed; its state is that of the checkpoint that holds it."""

    def __init__(self, steps: int) -> None:
        self.first = steps - max(1, steps // LAST)
        """Step that the sum begins at."""
        self._steps = steps
        self._counts_LE: Tensor | None = None

    def add(self, counts_LE: Tensor) -> None:
        now_LE = counts_LE.detach().double().cpu()
        self._counts_LE = now_LE if self._counts_LE is None else self._counts_LE + now_LE

    def write(self, folder: Path) -> None:
        """Writes experts.json: the steps (first, and the one after the last) and each layer's share of every expert."""
        if self._counts_LE is not None:
            layers = [[round(share, 6) for share in layer] for layer in shares(self._counts_LE).tolist()]
            content = {"steps": [self.first, self._steps], "shares": layers}
            write_atomic(folder / "experts.json", msgspec.json.encode(content) + b"\n")

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts_LE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts_LE = state["counts"]


def shares(counts_LE: Tensor) -> Tensor:
    """Each expert's part of its layer's assignments, float64; zeros for a layer without any."""
    counts_LE = counts_LE.double()
    return counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
