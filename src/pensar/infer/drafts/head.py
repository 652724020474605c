"""HeadDrafts: a trained draft head that writes ahead of the model's last state.

Of every running request it keeps keys and values of its window in a ring, and the states that the engine has computed
since it was last asked. Cells that hold guesses are written over by what came true, or closed.
Shape legend: R requests, C cells of a ring, n entries of a request, G rows still going, K key-value heads, H query
heads, h head_dim, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.infer.drafts.proposer import Asked, Drawing, States
from pensar.infer.request import Ints
from pensar.infer.rows import RunningRows
from pensar.model.draft_head import DraftHead
from pensar.model.qwen3 import Qwen3

MOST_ENTRIES = 64
"""Entries of a request that go through the head at once, and the most guesses."""
CLOSED = -1
"""Position of a cell that is not attended to."""


class HeadDrafts:
    """Guesses of one head for up to as many requests as there have been at once.

    What of a text lies before its reply is not among the states that an engine computes, so the head looks back to the
    reply's beginning at most, as it does in training.
    """

    wants_states = True

    def __init__(self, head: DraftHead, model: Qwen3) -> None:
        self.head, self.model = head, model
        weight = next(head.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._cells = head.window + MOST_ENTRIES
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._waiting: dict[str, list[States]] = {}
        self._keys = self._values = torch.zeros(0)
        self._positions: Ints = np.zeros((0, self._cells), np.int64)
        with torch.inference_mode(False):  # the model keeps its frequencies from the first use on
            model.rope_tables(torch.zeros(1, 1, dtype=torch.int64, device=self._device))

    def observe(self, rows: RunningRows, states: Sequence[States]) -> None:
        for new in states:
            waiting = self._waiting.setdefault(new.name, [])
            waiting.append(new)
            while sum(len(old.hidden_qD) for old in waiting[1:]) >= self.head.window:
                del waiting[0]

    def forget(self, name: str) -> None:
        self._waiting.pop(name, None)
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._positions[slot] = CLOSED
            self._free.append(slot)

    @torch.inference_mode()
    def propose(self, asked: Asked) -> list[Ints]:
        names = [asked.rows.requests[row].id for row in asked.chosen.tolist()]
        with Drawing(asked) as drawing:
            totals = asked.rows.state["total"][asked.chosen].tolist()
            drawing.drop(~np.array([self._knows(*pair) for pair in zip(names, totals, strict=True)]))
            if not len(drawing.going):
                return drawing.guesses()
            slots, hidden_GD = self._catch_up(asked, drawing, names)
            last = (
                asked.rows.state["total"][drawing.rows] - 2
            )  # position of the entry that has just been read
            while True:
                on, ids = drawing.take(self.model.logits(hidden_GD.to(self.model.model.norm.weight.dtype)))
                if not on.any():
                    return drawing.guesses()
                slots, last, hidden_GD = slots[on], last[on] + 1, hidden_GD[torch.from_numpy(on)]
                hidden_GD = self._pass(slots, ids[:, None], last[:, None], hidden_GD[:, None])[:, 0]

    # ------------------------------------------------------------ inside

    def _knows(self, name: str, total: int) -> bool:
        """Whether the state is there that the last token of a text was drawn from."""
        waiting = self._waiting.get(name)
        return waiting is not None and waiting[-1].first + len(waiting[-1].hidden_qD) == total - 1

    def _catch_up(self, asked: Asked, drawing: Drawing, names: list[str]) -> tuple[Ints, Tensor]:
        """Reads what has been added to the texts; the slots, and the last state [G, D] of each row that is going."""
        slots = np.array([self._slot(names[index]) for index in drawing.going.tolist()])
        # What was guessed beyond a text's kept part may have come true otherwise, or not at all.
        entries = [self._entries(asked.rows, row, names[index]) for row, index in _pairs(drawing)]
        first = np.array([positions[0] for positions, _ in entries])
        stale = self._positions[slots] >= first[:, None]
        self._positions[slots] = np.where(stale, CLOSED, self._positions[slots])
        longest = max(len(positions) for positions, _ in entries)
        last_GD = torch.empty(
            len(slots), self.head.config.hidden_size, device=self._device, dtype=self._dtype
        )
        for start in range(0, longest, MOST_ENTRIES):
            going = [at for at, (positions, _) in enumerate(entries) if len(positions) > start]
            part = [entries[at][0][start : start + MOST_ENTRIES] for at in going]
            width = max(len(positions) for positions in part)
            positions_Gn = np.full((len(going), width), CLOSED)
            tokens_Gn = np.zeros((len(going), width), np.int64)
            hidden_GnD = last_GD.new_zeros(len(going), width, last_GD.shape[1])
            for line, (at, positions) in enumerate(zip(going, part, strict=True)):
                row = int(drawing.rows[at])
                positions_Gn[line, : len(positions)] = positions
                tokens_Gn[line, : len(positions)] = asked.rows.tokens[row, positions + 1]
                hidden_GnD[line, : len(positions)] = entries[at][1][start : start + MOST_ENTRIES]
            out_GnD = self._pass(slots[going], tokens_Gn, positions_Gn, hidden_GnD)
            ends = torch.tensor([len(positions) - 1 for positions in part])
            last_GD[going] = out_GnD[torch.arange(len(going)), ends]
        for index in drawing.going.tolist():
            del self._waiting[names[index]]
        return slots, last_GD

    def _entries(self, rows: RunningRows, row: int, name: str) -> tuple[Ints, Tensor]:
        """Positions and states that have not been read, as far back as the window reaches."""
        waiting = self._waiting[name]
        positions = np.concatenate([np.arange(new.first, new.first + len(new.hidden_qD)) for new in waiting])
        hidden_nD = torch.cat([new.hidden_qD for new in waiting]).to(self._device, self._dtype)
        kept = min(len(positions), self.head.window)
        return positions[-kept:], hidden_nD[-kept:]

    def _pass(self, slots: Ints, tokens_Gn: Ints, positions_Gn: Ints, hidden_GnD: Tensor) -> Tensor:
        """The head over entries of several requests; positions that are CLOSED are padding."""
        rows_Gn = np.broadcast_to(slots[:, None], positions_Gn.shape)
        real = positions_Gn >= 0
        cells_Gn = np.where(real, positions_Gn % self._cells, 0)
        self._positions[rows_Gn[real], cells_Gn[real]] = positions_Gn[real]
        seen = self._positions[slots][:, None]
        at = positions_Gn[..., None]
        mask_GnC = (seen >= 0) & (seen <= at) & (seen > at - self.head.window)
        mask_GnC |= ~real[..., None]  # padding looks at anything: its output is not used
        targets = [self._there(rows_Gn[real]), self._there(cells_Gn[real])]
        mask_G1nC = self._there(mask_GnC)[:, None]
        attend = _Ring((self._keys, self._values), self._there(slots), targets, self._there(real), mask_G1nC)
        tokens, positions = self._there(tokens_Gn), self._there(np.maximum(positions_Gn, 0))
        out_GnD: Tensor = self.head(self.model, tokens, hidden_GnD, positions, attend)
        return out_GnD

    def _there(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def _slot(self, name: str) -> int:
        """The request's place in the rings."""
        if name not in self._slots:
            if not self._free:
                self._grow()
            self._slots[name] = self._free.pop()
        return self._slots[name]

    def _grow(self) -> None:
        have, config = len(self._positions), self.head.config
        more = max(8, have)
        shape = (more, config.num_kv_heads, self._cells, config.head_dim)
        new = torch.zeros(shape, device=self._device, dtype=self._dtype)
        self._keys = torch.cat((self._keys, new)) if have else new
        self._values = torch.cat((self._values, new)) if have else new.clone()
        self._positions = np.concatenate((self._positions, np.full((more, self._cells), CLOSED)))
        self._free.extend(range(have, have + more))


class _Ring:
    """The attend object of one pass of the head."""

    def __init__(
        self,
        pools: tuple[Tensor, Tensor],
        slots: Tensor,
        targets: list[Tensor],
        real_Gn: Tensor,
        mask_G1nC: Tensor,
    ) -> None:
        self._keys, self._values = pools
        self._slots, self._targets, self._real_Gn, self._mask_G1nC = slots, targets, real_Gn, mask_G1nC

    def __call__(self, layer: int, q_GnHh: Tensor, k_GnKh: Tensor, v_GnKh: Tensor) -> Tensor:
        rows, cells = self._targets
        self._keys[rows, :, cells] = k_GnKh[self._real_Gn]
        self._values[rows, :, cells] = v_GnKh[self._real_Gn]
        out_GHnh = F.scaled_dot_product_attention(
            q_GnHh.transpose(1, 2),
            self._keys[self._slots],
            self._values[self._slots],
            attn_mask=self._mask_G1nC,
            enable_gqa=True,
        )
        return out_GHnh.transpose(1, 2)


def _pairs(drawing: Drawing) -> list[tuple[int, int]]:
    """(row number, index into what was asked) of the rows that are going."""
    return list(zip(drawing.rows.tolist(), drawing.going.tolist(), strict=True))
