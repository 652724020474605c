"""Balance: how evenly the experts of a sparse model share the tokens of one step, over all ranks and micro-batches."""

import torch
from torch import Tensor

from pensar.base.ranks import World
from pensar.model.config import ModelConfig
from pensar.model.moe import Routing, balance_loss, expert_counts


class Balance:
    """The assignments of a step so far, and the load-balancing loss over the global batch (arXiv 2501.11873).

    Each micro-batch adds its assignments on all ranks before its loss is taken. With one micro-batch a step the loss
    is that of the global batch; with several, each one's expert shares are those of the step up to and with itself,
    since what comes later is not known without a second forward pass.
    """

    def __init__(self, config: ModelConfig, num_tokens: int, world: World) -> None:
        self.counts_LE = torch.zeros(config.num_layers, config.num_experts)
        self.num_tokens = float(num_tokens)
        """Of the whole step, over all ranks, without padding."""
        self._world = world

    def loss(self, layers: list[Routing], real_N: Tensor) -> Tensor:
        """This rank's part of the loss of one micro-batch; the parts of ranks and micro-batches add up.

        `real_N` is False for padding. Every rank must come here or to `absent` once for each micro-batch.
        """
        self._add(expert_counts(layers, real_N))
        return balance_loss(layers, self.counts_LE, num_tokens=self.num_tokens, real_N=real_N)

    def absent(self) -> None:
        """What a rank does that has no rows of a micro-batch: the others wait for its zeros."""
        self._add(torch.zeros_like(self.counts_LE))

    def _add(self, counts_LE: Tensor) -> None:
        self.counts_LE = self.counts_LE + self._world.all_reduce_(counts_LE)
