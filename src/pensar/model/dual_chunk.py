"""Dual Chunk Attention: a model trained on L positions reads several L, without training (arXiv 2402.17463).

The text is cut into chunks of `chunk_len = chunk_size - local_size` tokens and every key is rotated at its place
within its chunk, once, so that a cache of keys stays valid. A query is rotated three times:

- intra, for the keys of its own chunk: at its place r in the chunk, which gives the true distance;
- successive, for the chunk before: at min(r + chunk_len, chunk_size), the true distance to what is near;
- inter, for all earlier chunks: at min(2 chunk_len - 1, chunk_size), whatever r is.

No distance is thus larger than `chunk_size`. The three attentions are computed in tiles and merged by their sums of
exponentials, so memory grows with the text and not with its square. Beyond `original_max_positions` the scores also
get YaRN's temperature (arXiv 2309.00071, section 3.4) for the tokens so far; a temperature of the whole request, as
some engines have it, would make a token's output depend on tokens after it and on how the text is cut into passes.

Shape legend: B batch, T query tokens, S key tokens, H query heads, K key-value heads, h head_dim, G query heads of
one key-value head, M = G T.
"""

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from pensar.base.errors import ConfigError, ModelError
from pensar.model import rope
from pensar.model.config import Chunks, ModelConfig

TILE = 512
"""Queries and keys of one block of scores."""

Partial: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Attention over a part of the keys: weighted values [B, K, M, h], sum of weights and largest score [B, K, M, 1]."""


class DualChunk:
    """An attend object for inference: `model(tokens_BT, attend.rotary_positions_BT, attend)`.

    `positions_BT` counts up by one along each row; rows may begin at different places. The keys and values of a call
    are those of positions 0..S-1 of every row: the tokens of this pass where the rows begin at 0, else everything
    that a cache holds, whose keys were rotated at `rotary_positions_BT` of their pass.
    """

    def __init__(self, config: ModelConfig, positions_BT: Tensor) -> None:
        if config.dual_chunk is None:
            raise ConfigError("the model's dual_chunk is not set; give it the Chunks of its trained length")
        if bool((positions_BT.diff(dim=1) != 1).any()) or bool((positions_BT[:, 0] < 0).any()):
            raise ModelError("the positions of a row do not count up by one from 0 or more; give whole texts")
        self.chunks = config.dual_chunk
        self.rotary_positions_BT = positions_BT % self.chunks.chunk_len
        """Where the model rotates queries and keys of this pass."""
        self._inverse = rope.frequencies(config)[0].double().to(positions_BT.device)
        self._firsts: list[int] = positions_BT[:, 0].tolist()

    def __call__(self, layer: int, q_BTHh: Tensor, k_BSKh: Tensor, v_BSKh: Tensor) -> Tensor:
        needed = max(self._firsts) + q_BTHh.shape[1]
        if k_BSKh.shape[1] < needed:
            raise ModelError(
                f"{k_BSKh.shape[1]} keys for queries up to position {needed - 1}; a pass that does not begin at 0 "
                "needs the cached keys before it too"
            )
        if len(set(self._firsts)) == 1:
            return self._rows(q_BTHh, k_BSKh, v_BSKh, self._firsts[0])
        rows = zip(q_BTHh.split(1), k_BSKh.split(1), v_BSKh.split(1), self._firsts, strict=True)
        return torch.cat([self._rows(q, k, v, first) for q, k, v, first in rows])

    def queries(self, q_BTHh: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The intra, successive and inter queries [B, T, H, h] with their temperature.

        `q_BTHh` is rotated at `positions_T % chunk_len`: rotations add up, so the other two turn it further.
        """
        chunk_len, chunk_size = self.chunks.chunk_len, self.chunks.chunk_size
        place_T = positions_T % chunk_len
        successive_T = (place_T + chunk_len).clamp(max=chunk_size)
        inter = min(2 * chunk_len - 1, chunk_size)
        q_BTHh = self._tempered(q_BTHh, positions_T)
        return q_BTHh, self._turned(q_BTHh, successive_T - place_T), self._turned(q_BTHh, inter - place_T)

    def _rows(self, q_BTHh: Tensor, k_BSKh: Tensor, v_BSKh: Tensor, first: int) -> Tensor:
        """Attention of rows that all begin at position `first`."""
        out = []
        chunk_len = self.chunks.chunk_len
        for begin, end in _blocks(first, first + q_BTHh.shape[1], chunk_len):
            q = q_BTHh[:, begin - first : end - first]
            positions_T = torch.arange(begin, end, device=q.device)
            intra, successive, inter = self.queries(q, positions_T)
            chunk = begin - begin % chunk_len
            before = max(chunk - chunk_len, 0)
            spans = [(intra, chunk, end), (successive, before, chunk), (inter, 0, before)]
            total: Partial | None = None
            for turned, low, high in spans:
                for start in range(low, high, TILE):
                    stop = min(start + TILE, high)
                    tile = _tile(turned, k_BSKh[:, start:stop], v_BSKh[:, start:stop], begin - start)
                    total = tile if total is None else _merged(total, tile)
            assert total is not None
            out.append(_unfolded(total[0] / total[1], q))
        return torch.cat(out, dim=1)

    def _turned(self, q_BTHh: Tensor, by_T: Tensor) -> Tensor:
        angles_Th = by_T[:, None].double() * self._inverse
        angles_T1h = torch.cat((angles_Th, angles_Th), dim=-1)[:, None]
        wide = torch.promote_types(q_BTHh.dtype, torch.float32)
        turned = rope.rotate(q_BTHh.to(wide), angles_T1h.cos().to(wide), angles_T1h.sin().to(wide))
        return turned.to(q_BTHh.dtype)

    def _tempered(self, q_BTHh: Tensor, positions_T: Tensor) -> Tensor:
        original = self.chunks.original_max_positions
        if original is None:
            return q_BTHh
        # YaRN puts the factor on queries and on keys; here the queries carry both, so that cached keys stay valid.
        factor_T = (0.1 * ((positions_T + 1).double() / original).log() + 1.0).clamp(min=1.0).square()
        return q_BTHh * factor_T[:, None, None].to(q_BTHh.dtype)


def chunks_for(trained_positions: int) -> Chunks:
    """The authors' choice for a model trained on rows of `trained_positions`: chunks of 3/4, locality of 1/16."""
    return Chunks(
        chunk_size=trained_positions * 3 // 4,
        local_size=trained_positions // 16,
        original_max_positions=trained_positions,
    )


def _blocks(first: int, last: int, chunk_len: int) -> Iterator[tuple[int, int]]:
    """Spans of positions that cross neither a chunk's end nor its grid of tiles: a query always sees its own tile."""
    while first < last:
        place = first % chunk_len
        end = min(last, first - place + min(chunk_len, (place // TILE + 1) * TILE))
        yield first, end
        first = end


def _tile(q_BTHh: Tensor, k_BSKh: Tensor, v_BSKh: Tensor, ahead: int) -> Partial:
    """Attention over some keys, query 0 standing `ahead` places after key 0."""
    (batch, num_queries, _, size), heads = q_BTHh.shape, k_BSKh.shape[2]
    q_BTKGh = q_BTHh.view(batch, num_queries, heads, -1, size) * size**-0.5
    q_BKMh = q_BTKGh.permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores_BKMS = q_BKMh @ k_BSKh.permute(0, 2, 3, 1)
    scores_BKMS = scores_BKMS.to(torch.promote_types(scores_BKMS.dtype, torch.float32))
    num_keys = k_BSKh.shape[1]
    if num_keys > ahead + 1:
        shown_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BTHh.device).tril(ahead)
        scores_BKGTS = scores_BKMS.unflatten(2, (-1, num_queries)).masked_fill(~shown_TS, -torch.inf)
        scores_BKMS = scores_BKGTS.flatten(2, 3)
    tops = scores_BKMS.amax(dim=-1, keepdim=True)
    weights_BKMS = (scores_BKMS - tops).exp()
    values_BKMh = weights_BKMS.to(v_BSKh.dtype) @ v_BSKh.transpose(1, 2)
    return values_BKMh.to(tops.dtype), weights_BKMS.sum(dim=-1, keepdim=True), tops


def _merged(left: Partial, right: Partial) -> Partial:
    """Attention over the keys of both, on the scale of the larger top: less is rounded than with log-sum-exps."""
    tops = torch.maximum(left[2], right[2])
    left_share, right_share = (left[2] - tops).exp(), (right[2] - tops).exp()
    return left[0] * left_share + right[0] * right_share, left[1] * left_share + right[1] * right_share, tops


def _unfolded(out_BKMh: Tensor, q_BTHh: Tensor) -> Tensor:
    """The heads and type of the queries, [B, T, H, h]."""
    out_BKGTh: Tensor = out_BKMh.unflatten(2, (-1, q_BTHh.shape[1]))
    return out_BKGTh.permute(0, 3, 1, 2, 4).reshape(q_BTHh.shape).to(q_BTHh.dtype)
