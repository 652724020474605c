"""Context parallelism: every rank of a group holds a part of each row's tokens and sees the keys of all.

The parts are pieced together from both ends of the row, so that every rank has as many pairs of query and key to
compute in a causal mask (the balancing of Llama 3, arXiv 2407.21783, section 3.3.2).
Shape legend: B batch, T tokens of a row, t tokens of one rank, H query heads, K key-value heads, h head_dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F

from pensar.base.errors import ConfigError
from pensar.base.ranks import World
from pensar.model.attention import Attend, Packed
from pensar.train.parallel.mesh import Mesh


def columns_of(rank: int, size: int, num_tokens: int) -> Tensor:
    """Which columns [t] of a row a rank holds: the piece `rank` of 2 * size, and the one as far from the end."""
    if size == 1:
        return torch.arange(num_tokens)
    if num_tokens % (2 * size):
        raise ConfigError(
            f"rows of {num_tokens} tokens do not split into {2 * size} equal pieces for {size} context ranks; "
            f"use a context that is a multiple of {2 * size}"
        )
    pieces = torch.arange(num_tokens).view(2 * size, -1)
    return torch.cat((pieces[rank], pieces[2 * size - 1 - rank]))


class GatheredContext:
    """Attend for a part of the columns: keys and values of the other ranks are gathered, queries stay.

    Gathering costs 2 K h values a token and layer, less than passing them round a ring in as many steps where heads are
    grouped, and documents' borders need no care (section 3.3.2 of the same report).
    """

    def __init__(self, segments_BT: Tensor, context: World) -> None:
        size = context.size
        self._group = context.group
        order_T = torch.cat([columns_of(rank, size, segments_BT.shape[1]) for rank in range(size)])
        order_T = order_T.to(segments_BT.device)
        mine_t = order_T.view(size, -1)[context.rank]
        keys_BT, queries_Bt = segments_BT[:, order_T], segments_BT[:, mine_t]
        past_tT = order_T[None, :] <= mine_t[:, None]
        self.mask_B1tT = (queries_Bt[:, None, :, None] == keys_BT[:, None, None, :]) & past_tT
        self._bias_B1tT: Tensor | None = None

    def __call__(self, layer: int, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        keys_BTKh, values_BTKh = (_gathered(x, self._group) for x in (k_BTKh, v_BTKh))
        out_BHTh = F.scaled_dot_product_attention(
            q_BTHh.transpose(1, 2),
            keys_BTKh.transpose(1, 2),
            values_BTKh.transpose(1, 2),
            attn_mask=self._bias(q_BTHh.dtype),
            enable_gqa=q_BTHh.shape[2] != k_BTKh.shape[2],
        )
        return out_BHTh.transpose(1, 2)

    def _bias(self, dtype: torch.dtype) -> Tensor:
        """The mask as what is added to scores: of a mask, every layer would make and keep its own."""
        if self._bias_B1tT is None or self._bias_B1tT.dtype != dtype:
            seen = torch.zeros((), dtype=dtype, device=self.mask_B1tT.device)
            self._bias_B1tT = torch.where(self.mask_B1tT, seen, float("-inf"))
        return self._bias_B1tT


def attend_over(segments_BT: Tensor, context: World) -> Attend:
    """Attention within the segments of whole rows, for the columns of this rank."""
    if not bool(segments_BT.any()):
        # Attention over padding computes nothing, and every rank must have gradients of every weight.
        segments_BT = torch.ones_like(segments_BT)
    return Packed(segments_BT) if context.size == 1 else GatheredContext(segments_BT, context)


def routed_of(segments_BT: Tensor, mesh: Mesh) -> Tensor:
    """Which of the tokens that this rank's routers see are real: [N]; tensor ranks split those of a context rank."""
    context, split = mesh.context, mesh.layout.tp
    columns = columns_of(context.rank, context.size, segments_BT.shape[1])
    share = len(columns) // split
    rank = mesh.heads.get_local_rank()
    mine = columns[rank * share : (rank + 1) * share].to(segments_BT.device)
    return (segments_BT[:, mine] != 0).flatten()


def _gathered(x_BtKh: Tensor, group: Any) -> Tensor:
    """The columns of all ranks, in order of rank; backward, the gradients of all are summed and dealt out."""
    # One of the two names is deprecated in every version of torch.
    gather = (
        getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
    )
    out_BTKh: Tensor = gather(x_BtKh.contiguous(), 1, group)
    return out_BTKh
