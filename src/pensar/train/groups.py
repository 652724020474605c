"""Groups: the documents of pre-training by what marks them, and the training loss of each group over the steps."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

KEYS = ("domain", "language", "source", "kind")
"""Columns of the shards' list of documents by which the loss is told apart."""
UNMARKED = "unmarked"


class Groups:
    """One group for each combination of marks that a document has: sums over them give the loss by any mark."""

    def __init__(self, docs: pa.Table) -> None:
        """`docs` is the shards' list of documents."""
        self.keys = [key for key in KEYS if key in docs.column_names]
        known: dict[tuple[str, ...], int] = {}
        marks = zip(*(docs[key].to_pylist() for key in self.keys), strict=True)
        found = [known.setdefault(labels, len(known)) for labels in marks]
        self.of_document: npt.NDArray[np.int32] = np.array(found, np.int32)
        self.labels = list(known)

    def __len__(self) -> int:
        return len(self.labels)


class GroupLosses:
    """The sums of some steps; their state is that of the checkpoint that holds it."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._sums_2K = torch.zeros(2, len(groups), dtype=torch.float64)

    def add(self, sums_2K: Tensor) -> None:
        """Of one step over all ranks: cross-entropy and weight of each group."""
        self._sums_2K += sums_2K

    def take(self) -> dict[str, Any]:
        """Mark -> label -> mean loss and predicted tokens of the steps so far, which are forgotten."""
        losses, weights = self._sums_2K.tolist()
        self._sums_2K.zero_()
        row: dict[str, Any] = {}
        for place, key in enumerate(self._groups.keys):
            sums: dict[str, tuple[float, float]] = {}
            for labels, loss, weight in zip(self._groups.labels, losses, weights, strict=True):
                if weight:
                    label = labels[place] or UNMARKED
                    before = sums.get(label, (0.0, 0.0))
                    sums[label] = before[0] + loss, before[1] + weight
            row[key] = {
                label: {"loss": loss / weight, "tokens": weight}
                for label, (loss, weight) in sorted(sums.items())
            }
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"labels": [list(labels) for labels in self._groups.labels], "sums": self._sums_2K.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert [tuple(labels) for labels in state["labels"]] == self._groups.labels, "other shards"
        self._sums_2K = state["sums"].clone()
