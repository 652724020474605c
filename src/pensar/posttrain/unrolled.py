"""A draft head over whole replies, several guesses deep, each depth fed with the states of the one before.

In serving only the first guess after a pass has the model's own state to go on from; the next have the head's. So it
is trained on its own states as well (EAGLE-3, arXiv 2503.01840, section 3; HASS, arXiv 2408.15766). At depth d the
entry at position p stands for a row of guesses that began at p - d: it looks back on the model's states up to p - d and
on the head's own after that, so one pass computes a depth of all rows of guesses from the keys of those before.
Shape legend: B rows, T positions, D hidden, H query heads, K key-value heads, G query heads per key-value head,
h head_dim, c keys of the row of guesses, itself among them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.model.attention import Packed
from pensar.model.draft_head import DraftHead
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch


@dataclass(frozen=True, slots=True)
class Replies:
    """A batch of one sample a row as a draft head sees it; its `ce` stream marks the tokens of replies."""

    tokens_BT: Tensor
    positions_BT: Tensor
    segments_BT: Tensor
    entries_BT: Tensor
    """Number of the reply, from 1, that the token after each position belongs to; 0 for none."""

    @classmethod
    def of(cls, batch: Batch) -> "Replies":
        tokens, positions, segments = (
            torch.from_numpy(values).long() for values in (batch.tokens, batch.positions, batch.segments)
        )
        assert batch.ce is not None
        inside_BT = torch.from_numpy(batch.ce) != 0
        begins_BT = inside_BT & ~F.pad(inside_BT[:, :-1], (1, 0))
        numbers_BT = begins_BT.cumsum(1) * inside_BT
        return cls(tokens, positions, segments, _after(numbers_BT))

    def guessed(self, depth: int) -> Tensor:
        """[B, T] where the guess of this depth is of a token of the reply that its row of guesses began in."""
        began_BT = _shifted(self.entries_BT, depth)
        return (
            (self.entries_BT > 0)
            & (began_BT == self.entries_BT)
            & (_after(self.entries_BT) == self.entries_BT)
        )

    def hidden(self, model: Qwen3) -> Tensor:
        """The model's last states [B, T, D]."""
        with torch.no_grad():
            states: Tensor = model(self.tokens_BT, self.positions_BT, Packed(self.segments_BT))
        return states

    @property
    def next_tokens_BT(self) -> Tensor:
        return _after(self.tokens_BT)


def unroll(
    model: Qwen3, head: DraftHead, replies: Replies, hidden_BTD: Tensor, depths: int
) -> Iterator[Tensor]:
    """The head's states [B, T, D] of each depth: at position p they score the token at p + 2."""
    attend = _Unrolled(replies.entries_BT, head.window)
    states_BTD = hidden_BTD
    for depth in range(depths):
        if depth:
            states_BTD = F.pad(states_BTD[:, :-1], (0, 0, 1, 0))
        states_BTD = head(model, replies.next_tokens_BT, states_BTD, replies.positions_BT, attend)
        yield states_BTD


class _Unrolled:
    """The attend object of consecutive depths."""

    def __init__(self, entries_BT: Tensor, window: int) -> None:
        self._entries_BT, self._window = entries_BT, window
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, layer: int, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        depth = len(self._keys)
        self._keys.append(k_BTKh)
        self._values.append(v_BTKh)
        batch, length, _, size = q_BTHh.shape
        q_BTKGh = q_BTHh.view(batch, length, k_BTKh.shape[2], -1, size) * size**-0.5
        scores_BKGTT = torch.einsum("btkgh,bskh->bkgts", q_BTKGh, self._keys[0])
        scores_BKGTT = scores_BKGTT.masked_fill(~self._mask(depth)[:, None, None], -torch.inf)
        if not depth:
            out_BTKGh = torch.einsum("bkgts,bskh->btkgh", scores_BKGTT.softmax(-1), self._values[0])
            return out_BTKGh.reshape(q_BTHh.shape)
        # The row of guesses itself: at depth i it stood depth - i positions before.
        own_BTcKh = torch.stack([_shifted(self._keys[i], depth - i) for i in range(1, depth + 1)], 2)
        values_BTcKh = torch.stack([_shifted(self._values[i], depth - i) for i in range(1, depth + 1)], 2)
        own_BKGTc = torch.einsum("btkgh,btckh->bkgtc", q_BTKGh, own_BTcKh)
        weights = torch.cat((scores_BKGTT, own_BKGTc), -1).softmax(-1)
        out_BTKGh = torch.einsum("bkgts,bskh->btkgh", weights[..., :length], self._values[0])
        out_BTKGh = out_BTKGh + torch.einsum("bkgtc,btckh->btkgh", weights[..., length:], values_BTcKh)
        return out_BTKGh.reshape(q_BTHh.shape)

    def _mask(self, depth: int) -> Tensor:
        """[B, T, T] which of the model's own states a query looks back on."""
        at = torch.arange(self._entries_BT.shape[1], device=self._entries_BT.device)
        back = at[:, None] - at[None]
        near = (back >= depth) & (back < self._window)
        same_BTT = self._entries_BT[:, :, None] == self._entries_BT[:, None]
        mask_BTT = near & same_BTT & (self._entries_BT > 0)[:, :, None]
        # Positions outside of replies look at themselves: what comes out means nothing, and is finite.
        return mask_BTT | torch.eye(len(at), dtype=torch.bool, device=at.device) if not depth else mask_BTT


def _after(x_BT: Tensor) -> Tensor:
    """What stands one position later; 0 behind the last."""
    return F.pad(x_BT[:, 1:], (0, 1))


def _shifted(x: Tensor, by: int) -> Tensor:
    """What stood `by` positions [dimension 1] earlier; 0 before the first."""
    if not by:
        return x
    return torch.cat((torch.zeros_like(x[:, :by]), x[:, : x.shape[1] - by]), 1)
