"""StepBatch: what one forward pass computes; Runner: a model with the storage of its cache, which computes it.

A chunk of a prompt, one decoded token, a forced sentence, drafts to be verified: all are the next tokens of a row.
Shape legend: N tokens of all rows, R rows, P pages of the longest row, S tokens whose logits are asked for,
V vocabulary, D hidden.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pensar.infer.adapters import Adapter
from pensar.infer.request import Ints
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3

PAGE = 16
"""Tokens of a page of the cache."""


Row = tuple[Sequence[int] | Ints, int, Sequence[int] | Ints]
"""New tokens, how many tokens of the text are in the cache before them, and the text's pages in order."""


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

    @classmethod
    def of(cls, rows: Sequence[Row], *, last: bool = False) -> "StepBatch":
        """A batch of rows without adapters; all tokens are wanted, or the `last` of each row."""
        counts_R = np.array([len(tokens) for tokens, _, _ in rows])
        lengths_R = counts_R + np.array([done for _, done, _ in rows])
        starts = np.concatenate(([0], np.cumsum(counts_R)))
        pages_RP = np.zeros((len(rows), -(-int(lengths_R.max()) // PAGE)), np.int64)
        for row, (_, _, pages) in enumerate(rows):
            used = pages[: pages_RP.shape[1]]
            pages_RP[row, : len(used)] = used
        return cls(
            tokens_N=np.concatenate([np.asarray(tokens, np.int64) for tokens, _, _ in rows]),
            positions_N=np.arange(starts[-1]) + np.repeat(lengths_R - counts_R - starts[:-1], counts_R),
            starts=starts,
            lengths_R=lengths_R,
            pages_RP=pages_RP,
            wanted_S=starts[1:] - 1 if last else np.arange(starts[-1]),
        )


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
    lazy_room: bool
    """Whether room takes memory only where it is written to, so that all there may ever be can be reserved at once."""

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

    def read_pages(self, pages: Ints) -> Tensor:
        """What pages hold, as bytes [pages, bytes of a page] on the CPU that mean something to `write_pages` alone."""
        ...

    def write_pages(self, pages: Ints, bytes_PB: Tensor) -> None:
        """Gives pages what `read_pages` gave of others, bit for bit."""
        ...

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        """Takes new weights of the same names and shapes in place."""
        ...

    def set_adapter(self, number: int, adapter: Adapter | None) -> None:
        """Rows with this number in `adapters_R` are computed by `adapter` from now on; None takes it away."""
        ...

    def weigh(
        self, logits_NV: Tensor, temperature_N1: Tensor | None, uniform_N: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws from unfiltered rows, as pensar.infer.sampling.weigh."""
        ...

    def page_bytes(self) -> int:
        """Memory of one page over all layers."""
        ...

    def weight_bytes(self) -> int:
        """Memory of the weights, the module's own included."""
        ...

    def step_bytes(self, tokens: int, texts: int) -> int:
        """Memory of a pass of `tokens` new tokens at its highest, over rows whose texts have `texts` tokens together;
        logits are not counted."""
        ...


def rows_of(batch: StepBatch, rows: Ints) -> tuple[StepBatch, Ints]:
    """Some rows of a batch, and which of its wanted tokens are theirs."""
    counts = np.diff(batch.starts)
    starts = np.concatenate(([0], np.cumsum(counts[rows])))
    old_N = np.repeat(batch.starts[rows] - starts[:-1], counts[rows]) + np.arange(starts[-1])
    new_of = np.full(batch.starts[-1], -1)
    new_of[old_N] = np.arange(len(old_N))
    wanted = np.flatnonzero(new_of[batch.wanted_S] >= 0)
    part = replace(
        batch,
        tokens_N=batch.tokens_N[old_N],
        positions_N=batch.positions_N[old_N],
        starts=starts,
        lengths_R=batch.lengths_R[rows],
        pages_RP=batch.pages_RP[rows],
        wanted_S=new_of[batch.wanted_S[wanted]],
        adapters_R=None if batch.adapters_R is None else batch.adapters_R[rows],
    )
    return part, wanted


def run_apart(batch: StepBatch, adapters_R: Ints, run: Callable[[StepBatch, int], StepOutput]) -> StepOutput:
    """The rows of one adapter after those of another by `run(part, number)`, the output in the order of the batch."""
    outputs, places = [], []
    for number in np.unique(adapters_R).tolist():
        part, wanted = rows_of(batch, np.flatnonzero(adapters_R == number))
        outputs.append(run(part, number))
        places.append(wanted)
    logits_SV = torch.cat([output.logits_SV for output in outputs])
    order = torch.from_numpy(np.argsort(np.concatenate(places))).to(logits_SV.device)
    return StepOutput(logits_SV[order], torch.cat([output.hidden_SD for output in outputs])[order])


def module_bytes(model: Qwen3) -> int:
    """Memory of a module's weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def give_back() -> None:
    """Returns to the system what has been freed, where the C library would keep it: after weights have been packed or a
    cache has moved, that is more than a step will ever ask for."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
