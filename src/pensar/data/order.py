"""The order in which pre-training reads tokens: row i is a pure function of (shards, mixture, context, seed, i).

One pass over a mixture reads document d either floor(w_d) or ceil(w_d) times, and after p passes within one of
p w_d times, so that no document's epochs run away. Nothing depends on the number of ranks or on what was read
before: training resumes at any row by asking for it.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pensar.base.errors import ConfigError, DataError
from pensar.base.files import seed_of
from pensar.data.hashing import permutation, uniform
from pensar.data.layout import LONG, Cut, Layout, long_layout, stream_layout
from pensar.data.shards import Shards

Ints = npt.NDArray[np.int32]
CACHED_PASSES = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row."""

    tokens: Ints
    """[context]"""
    segments: Ints
    """[context]; the documents of the row are numbered from 1, there is no padding."""
    documents: Ints | None = None
    """[context]; the place of each token's document in the shards' list."""


class PretrainData:
    """Rows of packed tokens of one mixture.

    The mixture `long` begins each row with a piece of a document that is longer than half the context and fills the
    rest with shorter ones; where too few documents are that long, neighbours of one source are joined to one.
    """

    def __init__(
        self, folder: Path, mixture: str, context: int, seed: int, *, tokenizer: Path | None = None
    ) -> None:
        if context < 2:
            raise ConfigError(f"context is {context}; a row needs at least 2 tokens")
        self.shards = Shards(folder, tokenizer)
        self.mixture, self.context, self.seed = mixture, context, seed
        self._weights = self.shards.weights(mixture)
        self._lengths = self.shards.lengths()
        self._sources: list[str] = self.shards.docs["source"].to_pylist()
        expected = float((self._weights * self._lengths).sum())
        if expected < context:
            raise DataError(
                f"mixture {mixture!r} of {folder} has {expected:.0f} tokens, less than one row of {context}; "
                "add documents or shorten the context"
            )
        self._layout = lru_cache(maxsize=CACHED_PASSES)(self._make_layout)
        self._shuffle = lru_cache(maxsize=CACHED_PASSES)(self._make_shuffle)
        self._first_rows = [0]

    @property
    def num_tokens(self) -> int:
        """Tokens of the first pass, as whole rows."""
        return self._layout(0).num_rows * self.context

    @property
    def long_share(self) -> float:
        """Share of the first pass's tokens that lie in pieces longer than half the context."""
        return self._layout(0).long_share(self.context)

    def row(self, i: int) -> Row:
        """The i-th row of the endless sequence of passes."""
        number, inside = self._locate(i)
        return self._row_of(self._layout(number).pieces(inside))

    def documents_of(self, i: int) -> list[str]:
        """Ids of the documents that row `i` shows, in order."""
        number, inside = self._locate(i)
        ids = self.shards.docs["doc_id"]
        return [ids[piece.document].as_py() for piece in self._layout(number).pieces(inside)]

    def _locate(self, i: int) -> tuple[int, int]:
        """(pass, row of the pass's layout) of a global row."""
        if i < 0:
            raise ConfigError(f"row {i} does not exist; rows are numbered from 0")
        while self._first_rows[-1] <= i:
            number = len(self._first_rows) - 1
            self._first_rows.append(self._first_rows[-1] + self._layout(number).num_rows)
        number = int(np.searchsorted(self._first_rows, i, side="right")) - 1
        return number, int(self._shuffle(number)[i - self._first_rows[number]])

    def _make_shuffle(self, number: int) -> npt.NDArray[np.int64]:
        """The order of a pass's rows: the rows that one long document fills must not follow each other."""
        return permutation(self._layout(number).num_rows, seed_of(self.seed, "rows", self.mixture, number))

    def _make_layout(self, number: int) -> Layout:
        seed = seed_of(self.seed, "order", self.mixture, number)
        documents = self._drawn(number)
        if self.mixture == LONG:
            layout = long_layout(documents, self._lengths, self._sources, self.context, seed)
            if layout is not None:
                return layout
        documents = documents[permutation(len(documents), seed)]
        return stream_layout(documents, self._lengths, self.context)

    def _drawn(self, number: int) -> npt.NDArray[np.int64]:
        """Documents of a pass, each as often as the pass reads it.

        Document d stands floor((p+1) w + u) - floor(p w + u) times, with u_d fixed by the seed.
        """
        offsets = uniform(np.arange(len(self._weights)), seed_of(self.seed, "phase", self.mixture))
        until, before = (number + 1) * self._weights + offsets, number * self._weights + offsets
        times = (np.floor(until) - np.floor(before)).astype(np.int64)
        # Repetition by repetition, so that a document never stands beside itself.
        rounds = [np.flatnonzero(times > past) for past in range(int(times.max()))]
        return np.concatenate(rounds) if rounds else np.empty(0, np.int64)

    def _row_of(self, pieces: list[Cut]) -> Row:
        parts = [self.shards.tokens(piece.document, piece.start, piece.end) for piece in pieces]
        segments = np.zeros(self.context, np.int32)
        position = segment = 0
        for piece, part in zip(pieces, parts, strict=True):
            segment += piece.begins_segment or position == 0
            segments[position : position + len(part)] = segment
            position += len(part)
        documents = np.repeat([piece.document for piece in pieces], [len(part) for part in parts])
        return Row(np.concatenate(parts), segments, documents.astype(np.int32))
