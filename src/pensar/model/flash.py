"""Documents: attention within packed documents on an accelerator, without a mask of all pairs of tokens.

Half precision has a flash kernel for sequences of any lengths side by side: it takes the documents of all rows at once.
What that kernel does not know (float32, odd head sizes) goes through FlexAttention, which leaves out the blocks of a
row that no document joins (arXiv 2412.05496). The dense mask is the last resort.
Shape legend: B rows, T tokens, H query heads, K key-value heads, h head_dim, N tokens of all rows, D documents,
n blocks of a row.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.model import hardware

HALF = (torch.bfloat16, torch.float16)
BLOCK = 128
"""Tokens of a block of FlexAttention's mask: the library's default."""


class Documents:
    """Where the documents of a batch lie, in the form that each kernel asks for; a run of padding counts as one.

    `segments_BT` numbers the documents of a row, each in one piece; `lengths` are those of all rows in order.
    """

    def __init__(self, segments_BT: Tensor, lengths: Sequence[int]) -> None:
        self.longest = max(lengths)
        self.starts = offsets(lengths).to(segments_BT.device)
        self._segments_BT = segments_BT
        self._blocks: Any = None
        self._mask: Tensor | None = None

    def __call__(self, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        """Causal attention [B, T, H, h] of each document by itself."""
        if q_BTHh.dtype != v_BTKh.dtype:  # norms of queries and keys work in float32 where types are mixed
            q_BTHh, k_BTKh = q_BTHh.to(v_BTKh.dtype), k_BTKh.to(v_BTKh.dtype)
        if takes_flash(q_BTHh):
            return self._flash(q_BTHh, k_BTKh, v_BTKh)
        if takes_flex(q_BTHh):
            return flex(q_BTHh, k_BTKh, v_BTKh, self.blocks())
        if self._mask is None:
            self._mask = dense_mask(self._segments_BT)
        return masked(q_BTHh, k_BTKh, v_BTKh, self._mask)

    def blocks(self) -> Any:
        """FlexAttention's `BlockMask` of these documents."""
        if self._blocks is None:
            with torch.no_grad():
                self._blocks = block_mask(self._segments_BT)
        return self._blocks

    def _flash(self, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        attend = varlen()
        assert attend is not None
        q_NHh, k_NKh, v_NKh = (x.flatten(0, 1) for x in (q_BTHh, k_BTKh, v_BTKh))
        starts, longest = self.starts, self.longest
        out_NHh = attend(q_NHh, k_NKh, v_NKh, starts, starts, longest, longest)
        return out_NHh.view(q_BTHh.shape)


def offsets(lengths: Sequence[int]) -> Tensor:
    """Where each document begins among the tokens of all rows, and where the last one ends: [D + 1], int32."""
    return F.pad(torch.tensor(list(lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


@cache
def varlen() -> Callable[..., Tensor] | None:
    """The library's causal variable-length flash attention with grouped heads; None where it has none (before 2.11).

    Version 2.11 groups heads unasked, later ones want to be told.
    """
    try:
        from torch.nn.attention import varlen as library
    except ImportError:
        return None
    kernel: Any = library.varlen_attn  # what it takes differs from version to version
    known = inspect.signature(kernel).parameters
    if "window_size" not in known:
        return None
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(*arguments: Any) -> Tensor:
        out: Tensor = kernel(*arguments, window_size=(-1, 0), **grouped)
        return out

    return attend


def takes_flash(q_BTHh: Tensor) -> bool:
    """Whether the flash kernel takes these queries and keys of their type, size and place."""
    return (
        q_BTHh.dtype in HALF
        and q_BTHh.shape[-1] % 8 == 0
        and q_BTHh.shape[-1] <= 256
        and hardware.capability(q_BTHh.device) >= hardware.AMPERE
        and varlen() is not None
    )


def takes_flex(q_BTHh: Tensor) -> bool:
    """Whether FlexAttention's kernels take these queries, gradients included."""
    return q_BTHh.device.type == "cuda" and q_BTHh.dtype != torch.float64 and q_BTHh.shape[-1] >= 16


def flex(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, blocks: Any) -> Tensor:
    """FlexAttention over the pairs of a `BlockMask`."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHh, k_BTKh, v_BTKh))
    out_BHTh = _compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    return out_BHTh.transpose(1, 2)


def block_mask(segments_BT: Tensor) -> Any:
    """The causal `BlockMask` of documents that lie each in one piece, from the ends of the blocks alone.

    A block of keys before a block of queries is needed if the document of its last token goes on to the first query,
    and needs no mask if that of its first token goes on to the last query. The library's own way to it looks at all
    T x T pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens = segments_BT.shape[1]
    run_BT = F.pad((segments_BT[:, 1:] != segments_BT[:, :-1]).cumsum(1), (1, 0))
    # Beyond the row's end a run of its own, so that the last block is masked.
    run_BT = F.pad(run_BT, (0, -num_tokens % BLOCK), value=num_tokens)
    first_Bn, last_Bn = run_BT[:, ::BLOCK], run_BT[:, BLOCK - 1 :: BLOCK]
    num_blocks = first_Bn.shape[1]
    index_n = torch.arange(num_blocks, device=segments_BT.device)
    before_nn = index_n[:, None] > index_n
    joined_Bnn = before_nn & (last_Bn[:, None, :] == first_Bn[:, :, None])
    whole_Bnn = before_nn & (first_Bn[:, None, :] == last_Bn[:, :, None])
    partial_Bnn = (joined_Bnn & ~whole_Bnn) | (index_n[:, None] == index_n)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (run_BT[row, query] == run_BT[row, key])

    return BlockMask.from_kv_blocks(
        *_listed(partial_Bnn),
        *_listed(whole_Bnn),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(num_tokens, num_tokens),
    )


def dense_mask(segments_BT: Tensor) -> Tensor:
    """True where a query [B, 1, T, .] may see a key [B, 1, ., T]."""
    same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    num_tokens = segments_BT.shape[1]
    past = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segments_BT.device).tril()
    return same & past


def masked(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, mask: Tensor | None) -> Tensor:
    """The library's attention over the pairs of a dense mask; over all of the past without one."""
    out_BHTh = F.scaled_dot_product_attention(
        q_BTHh.transpose(1, 2),
        k_BTKh.transpose(1, 2),
        v_BTKh.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BTHh.shape[2] != k_BTKh.shape[2],
    )
    return out_BHTh.transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention as written computes all pairs; only its compiled form leaves blocks out."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _listed(chosen_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their numbers in front of the others': [B, 1, n, ...]."""
    chosen = chosen_Bnn[:, None].to(torch.int32)
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()
