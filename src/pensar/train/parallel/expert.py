"""Expert parallelism: every rank of a group holds some of the experts, and tokens travel to theirs and back.

Shape legend: M rows (a token once for each of its experts), D hidden, E experts of the model, e experts of one rank,
R ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from pensar.model.moe import Experts, swiglu
from pensar.train.parallel.parts import local_of


class Dispatch:
    """Takes the place of `Experts.forward` of one layer: rows go to the ranks of their experts and come back."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        self._experts = experts
        self._group = group
        self._ranks = dist.get_world_size(group)

    def __call__(self, sorted_x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """SwiGLU of rows that are sorted by expert; the same rows as on one rank, in the same order."""
        mine_RE = self._counts_for_me(counts_E)
        sent = counts_E.view(self._ranks, -1).sum(-1).tolist()
        received = mine_RE.sum(-1).tolist()
        arrived_MD = _exchange(sorted_x_MD, received, sent, self._group)
        order_M = _by_expert(mine_RE)
        out_MD = torch.empty_like(arrived_MD)
        weights = local_of(self._experts.gate_up_proj), local_of(self._experts.down_proj)
        computed_MD = swiglu(arrived_MD[order_M], mine_RE.sum(0), *weights)
        out_MD = out_MD.index_copy(0, order_M, computed_MD)
        return _exchange(out_MD, sent, received, self._group)

    def _counts_for_me(self, counts_E: Tensor) -> Tensor:
        """[R, e]: rows that each rank sends to each of this rank's experts."""
        mine_E = torch.empty_like(counts_E)
        dist.all_to_all_single(mine_E, counts_E.contiguous(), group=self._group)
        return mine_E.view(self._ranks, -1)


def split_experts(experts: nn.Module, group: dist.ProcessGroup) -> None:
    """Sends the rows of this layer through the ranks of `group`, whose weights are cut already."""
    assert isinstance(experts, Experts)
    experts.forward = Dispatch(experts, group)  # type: ignore[method-assign]


def _exchange(x_MD: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    out_MD: Tensor = all_to_all_single_autograd(x_MD.contiguous(), received, sent, group)
    return out_MD


def _by_expert(counts_RE: Tensor) -> Tensor:
    """Order [M] that turns rows sorted by (rank, expert) into rows sorted by expert."""
    num_ranks, num_experts = counts_RE.shape
    expert_M = torch.arange(num_experts, device=counts_RE.device).repeat(num_ranks)
    return expert_M.repeat_interleave(counts_RE.flatten()).argsort(stable=True)
