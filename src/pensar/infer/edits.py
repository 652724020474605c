"""Edits: changes to some rows of logits, gathered so that they are made all at once. S rows, V vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pensar.infer.grammar import Bits
from pensar.infer.request import Ints
from pensar.infer.seen import Floats


@dataclass(slots=True)
class Edits:
    """In the order in which they are made."""

    penalties: list[tuple[int, Ints, Floats, Floats]] = field(default_factory=list)
    """Row, ids, divisors of positive logits, and what is taken off."""
    biases: list[tuple[int, Ints, Floats]] = field(default_factory=list)
    bans: list[tuple[int, Ints]] = field(default_factory=list)
    masks: list[tuple[int, Bits]] = field(default_factory=list)

    def apply(self, logits_SV: Tensor) -> None:
        """Makes them, in place; the logits are contiguous."""
        device, vocabulary = logits_SV.device, logits_SV.shape[1]
        flat = logits_SV.view(-1)

        def tensor(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        if self.penalties:
            at = tensor(_flat(self.penalties, vocabulary))
            divisor = tensor(np.concatenate([each[2] for each in self.penalties]))
            taken = tensor(np.concatenate([each[3] for each in self.penalties]))
            values = flat[at]
            flat[at] = torch.where(values > 0, values / divisor, values * divisor) - taken
        if self.biases:
            at = tensor(_flat(self.biases, vocabulary))
            flat[at] += tensor(np.concatenate([each[2] for each in self.biases]))
        if self.bans:
            flat[tensor(_flat(self.bans, vocabulary))] = -torch.inf
        if self.masks:
            rows = tensor(np.array([row for row, _ in self.masks]))
            packed = tensor(np.stack([bits for _, bits in self.masks]))
            # Eight tokens at a look; adding minus infinity takes a fifth of the time of filling it in under a mask.
            walls = tensor(_walls()).index_select(0, packed.int().flatten()).view(len(rows), -1)
            logits_SV.index_add_(0, rows, walls[:, :vocabulary])


@lru_cache(maxsize=1)
def _walls() -> Floats:
    """For every byte of Bits what is added to the logits of its eight tokens: nothing, or minus infinity."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(0), np.float32(-np.inf))


def _flat(edits: Iterable[tuple[int, Ints, *tuple[object, ...]]], vocabulary: int) -> Ints:
    """Where the ids of all edits stand when the rows follow one another."""
    return np.concatenate([edit[0] * vocabulary + edit[1] for edit in edits])
