"""StepBatch: what one forward pass computes; Runner: a model with the storage of its cache, which computes it.

A chunk of a prompt, one decoded token, a forced sentence, drafts to be verified: all are the next tokens of a row.
Shape legend: N tokens of all rows, R rows, P pages of the longest row, S tokens whose logits are asked for,
V vocabulary, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pensar.infer.request import Ints
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3

PAGE = 16
"""Tokens of a page of the cache."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Of each of R rows the next tokens of its text."""

    tokens_N: Ints
    """The rows' tokens one after another."""
    positions_N: Ints
    starts: Ints
    """[R + 1]: row r computes the tokens starts[r] to starts[r + 1] - 1, at least one."""
    lengths_R: Ints
    """Tokens of each row in the cache after this pass, the new ones included."""
    pages_RP: Ints
    """Pages of each row's text in order; entries beyond its length are 0 and are not read."""
    wanted_S: Ints
    """Indices into N, ascending."""
    adapters_R: Ints | None = None
    """Number of each row's adapter, -1 for none; None where no row has one."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Scores over the vocabulary in float32, and the states after the final norm that they come from."""

    logits_SV: Tensor
    hidden_SD: Tensor


class Runner(Protocol):
    """A model and the pages of its cache; page 0 is there from the start and may hold anything."""

    config: ModelConfig
    model: Qwen3
    """The module whose weights it computes with."""
    device: torch.device

    def reserve(self, num_pages: int) -> None:
        """Makes room for so many pages; what is stored stays."""
        ...

    def run(self, batch: StepBatch) -> StepOutput:
        """Stores keys and values of the new tokens, and attends over each row's text up to each token."""
        ...

    def copy_pages(self, sources: Ints, targets: Ints) -> None: ...

    def wipe_pages(self, pages: Ints) -> None:
        """Zeroes pages that may hold NaN, which would outlive its request."""
        ...

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        """Takes new weights of the same names and shapes in place."""
        ...

    def page_bytes(self) -> int:
        """Memory of one page over all layers."""
        ...
