"""Layouts of one pass: which pieces of which documents stand in each row."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pensar.data.hashing import permutation

Indices = npt.NDArray[np.int64]
LONG = "long"
TARGET_LONG_SHARE = 0.75
"""Share of text in long pieces that the Qwen3 report gives for its long-context stage (section 3.2)."""


class Cut(NamedTuple):
    """Part of a document: tokens `start` to `end`."""

    document: int
    start: int
    end: int
    begins_segment: bool = True
    """False where it goes on in the segment of the piece before it."""


@dataclass
class Stream:
    """Documents one after another; `span(a, b)` is the pieces from token a to token b of the whole."""

    documents: Indices
    lengths: Indices
    ends: Indices = field(init=False)

    def __post_init__(self) -> None:
        self.ends = np.cumsum(self.lengths[self.documents])

    @property
    def num_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def span(self, start: int, end: int) -> list[Cut]:
        """Pieces that cover the tokens `start` to `end`."""
        pieces: list[Cut] = []
        index = int(np.searchsorted(self.ends, start, side="right"))
        while start < end:
            document = int(self.documents[index])
            first = int(self.ends[index]) - int(self.lengths[document])
            last = min(end, int(self.ends[index]))
            pieces.append(Cut(document, start - first, last - first))
            start, index = last, index + 1
        return pieces


@dataclass
class Layout:
    """Rows of a pass: row r is `heads[r]`, filled up from the stream."""

    context: int
    stream: Stream
    heads: list[list[Cut]]
    num_rows: int
    fill_starts: Indices
    """Where in the stream each row's filling begins."""

    def pieces(self, row: int) -> list[Cut]:
        """The pieces of a row; together they are exactly `context` tokens."""
        head = self.heads[row] if self.heads else []
        needed = self.context - sum(piece.end - piece.start for piece in head)
        pieces = list(head)
        start = int(self.fill_starts[row])
        while needed:
            # A stream that is used up begins again: the last rows of a pass may repeat its short documents.
            start %= self.stream.num_tokens
            end = min(start + needed, self.stream.num_tokens)
            pieces += self.stream.span(start, end)
            needed -= end - start
            start = end
        return pieces

    def long_share(self, context: int) -> float:
        """Share of tokens in segments longer than half the context."""
        long = 0
        for row in range(self.num_rows):
            bounds: list[int] = []
            position = 0
            for piece in self.pieces(row):
                if piece.begins_segment or not bounds:
                    bounds.append(position)
                position += piece.end - piece.start
            sizes = [after - before for before, after in pairwise([*bounds, position])]
            long += sum(size for size in sizes if size > context // 2)
        return long / max(self.num_rows * context, 1)


def stream_layout(documents: Indices, lengths: Indices, context: int) -> Layout:
    """Documents one after another, cut every `context` tokens; the rest of less than a row is left out."""
    stream = Stream(documents, lengths)
    # A pass shorter than one row repeats itself within the row.
    num_rows = max(1, stream.num_tokens // context)
    return Layout(context, stream, [], num_rows, np.arange(num_rows, dtype=np.int64) * context)


def long_layout(
    documents: Indices, lengths: Indices, sources: list[str], context: int, seed: int
) -> Layout | None:
    """Rows that begin with a long piece; None when not even joined documents make one.

    Documents longer than half the context are cut into pieces of at most one row. If these hold less than three
    quarters of the tokens, neighbouring short documents of one source are joined until they do; a group is read
    as one document, with attention from one part to the next.
    """
    heads: list[list[Cut]] = []
    short: list[int] = []
    for document in documents.tolist():
        cut = _cut(document, int(lengths[document]), context)
        heads += [[piece] for piece in cut]
        if not cut:
            short.append(document)
    wanted = TARGET_LONG_SHARE * float(lengths[documents].sum())
    missing = wanted - sum(piece.end - piece.start for head in heads for piece in head)
    groups, left = _joined(short, lengths, sources, context, missing, seed)
    heads += groups
    if not heads or not left:
        return None
    heads = [heads[index] for index in permutation(len(heads), seed).tolist()]
    stream = Stream(np.array(left)[permutation(len(left), seed + 1)], lengths)
    gaps = [context - sum(piece.end - piece.start for piece in head) for head in heads]
    starts = np.cumsum([0, *gaps[:-1]], dtype=np.int64)
    return Layout(context, stream, heads, len(heads), starts)


def _cut(document: int, length: int, context: int) -> list[Cut]:
    """A long document in even pieces of at most `context`, longer than half of it; nothing for a short document."""
    if length <= context // 2:
        return []
    num = -(-length // context)
    bounds = [length * part // num for part in range(num + 1)]
    return [Cut(document, start, end) for start, end in pairwise(bounds)]


def _joined(
    short: list[int], lengths: Indices, sources: list[str], context: int, missing: float, seed: int
) -> tuple[list[list[Cut]], list[int]]:
    """Groups of neighbours that hold about `missing` tokens, and the documents that stay alone."""
    groups: list[list[int]] = []
    group: list[int] = []
    size = 0
    for document in short:
        length = int(lengths[document])
        if group and (sources[document] != sources[group[-1]] or size + length > context):
            groups.append(group)
            group, size = [], 0
        group.append(document)
        size += length
    if group:
        groups.append(group)
    sizes = [int(lengths[group].sum()) for group in groups]
    long: list[list[Cut]] = []
    alone: list[int] = []
    for index in permutation(len(groups), seed).tolist():
        if missing > 0 and sizes[index] > context // 2 and len(groups) > 1:
            parts = enumerate(groups[index])
            long.append([Cut(d, 0, int(lengths[d]), begins_segment=place == 0) for place, d in parts])
            missing -= sizes[index]
        else:
            alone += groups[index]
    return long, alone
