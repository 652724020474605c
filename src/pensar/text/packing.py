"""Packing: samples laid into rows of equal length, and rows gathered into the batches that the trainer
reads."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from pensar.base.errors import ConfigError, DataError
from pensar.base.files import seed_of
from pensar.text.sample import Floats, Ints, Sample

STREAMS = ("ce", "pg", "kl", "behaviour")


class Rows(StrEnum):
    """How samples become rows."""

    BEST_FIT = "best-fit"
    """Several samples share a row, each a segment of its own."""
    SINGLE = "single"
    """One sample a row, padded to the longest of its batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B rows of T tokens. A stream is None when no sample of the batch has it; elsewhere missing means 0."""

    tokens: Ints
    """[B, T]; `pad` where the segment is 0."""
    positions: Ints
    """[B, T], from 0 in each segment."""
    segments: Ints
    """[B, T], 1, 2, ... for the samples of a row and 0 for padding."""
    ce: Floats | None = None
    pg: Floats | None = None
    kl: Floats | None = None
    behaviour: Floats | None = None
    groups: Ints | None = None
    """[B, T], whose loss each token counts into beside the step's; None where nobody asks."""
    num_groups: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of samples, without padding."""
        return int(np.count_nonzero(self.segments))

    def rows(self, chosen: slice) -> "Batch":
        """The batch of the chosen rows, as views; its width stays."""
        streams = {name: getattr(self, name) for name in STREAMS}
        return Batch(
            tokens=self.tokens[chosen],
            positions=self.positions[chosen],
            segments=self.segments[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            num_groups=self.num_groups,
            **{name: None if values is None else values[chosen] for name, values in streams.items()},
        )


def pack(samples: Sequence[Sample], *, context: int, rows: Rows = Rows.BEST_FIT) -> list[list[int]]:
    """Which samples, by index, share each row of at most `context` tokens.

    Best fit takes the samples from long to short and puts each into the fullest row that has room, so no
    sample is ever cut (Ding et al. 2024, arXiv:2404.10830). Raises DataError for a sample that is empty or
    longer than `context`; see `truncate`.
    """
    if context < 1:
        raise ConfigError(f"context {context} tokens is below 1; give the length of a row")
    for index, sample in enumerate(samples):
        _check(sample, index, context)
    if rows is Rows.SINGLE:
        return [[index] for index in range(len(samples))]
    packed: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending, only of rows that have any
    for index in sorted(range(len(samples)), key=lambda index: (-len(samples[index]), index)):
        length = len(samples[index])
        place = bisect_left(room, (length, 0))
        if place < len(room):
            free, row = room.pop(place)
            packed[row].append(index)
        else:
            free, row = context, len(packed)
            packed.append([index])
        if free > length:
            insort(room, (free - length, row))
    return packed


def truncate(samples: Sequence[Sample], context: int) -> tuple[list[Sample], int]:
    """The samples cut to their first `context` tokens, and how many were cut."""
    cut = [sample if len(sample) <= context else _head(sample, context) for sample in samples]
    return cut, sum(len(sample) > context for sample in samples)


def batches(
    samples: Sequence[Sample],
    tokens_per_batch: int,
    *,
    context: int,
    rows: Rows = Rows.BEST_FIT,
    seed: int = 0,
    pad: int = 0,
    multiple: int = 1,
) -> Iterator[Batch]:
    """All samples once, as batches of at most `tokens_per_batch` tokens, padding included.

    The order depends on nothing but the samples, the arguments and `seed`. Rows of like length come together,
    so that little is padding; which batch comes first is random. T is the longest row rounded up to
    `multiple`, at most `context`. A row longer than `tokens_per_batch` is a batch of its own. `pad` is the
    token id of the padding.
    """
    if tokens_per_batch < 1 or multiple < 1:
        raise ConfigError(f"tokens_per_batch {tokens_per_batch} and multiple {multiple} must be at least 1")
    generator = np.random.default_rng(seed_of("batches", seed))
    shuffled = [samples[index] for index in generator.permutation(len(samples))]
    packed = [[shuffled[index] for index in row] for row in pack(shuffled, context=context, rows=rows)]
    packed.sort(key=lambda row: -_length(row))  # stable: rows of equal length stay shuffled
    groups: list[list[list[Sample]]] = []
    width = 0
    for row in packed:
        if not groups or width * (len(groups[-1]) + 1) > tokens_per_batch:
            groups.append([])
            width = _round_up(_length(row), multiple, context)
        groups[-1].append(row)
    for index in generator.permutation(len(groups)):
        group = groups[index]
        yield collate(group, length=_round_up(_length(group[0]), multiple, context), pad=pad)


def one_per_row(samples: Sequence[Sample], *, pad: int = 0) -> Batch:
    """One batch with a row for each sample, as wide as the longest."""
    longest = max((len(sample) for sample in samples), default=0)
    return collate([[sample] for sample in samples], length=longest, pad=pad)


def collate(rows: Sequence[Sequence[Sample]], *, length: int, pad: int = 0) -> Batch:
    """Lays rows of samples out as one batch of `length` columns, which must hold the longest row.

    The streams are 0 at the first token of each segment, whatever the sample says: a loss that pairs each
    column with the one before it would else predict a sample from its neighbour.
    """
    shape = (len(rows), length)
    tokens = np.full(shape, pad, np.int32)
    positions = np.zeros(shape, np.int32)
    segments = np.zeros(shape, np.int32)
    present = [sample for row in rows for sample in row]
    used = [name for name in STREAMS if any(getattr(sample, name) is not None for sample in present)]
    streams: dict[str, Any] = {name: np.zeros(shape, np.float32) for name in used}
    for line, row in enumerate(rows):
        if _length(row) > length:
            raise DataError(
                f"row {line} has {_length(row)} tokens, more than the batch's {length}; pack it so"
            )
        start = 0
        for segment, sample in enumerate(row, start=1):
            end = start + len(sample)
            tokens[line, start:end] = sample.tokens
            positions[line, start:end] = np.arange(len(sample))
            segments[line, start:end] = segment
            for name, stream in streams.items():
                values = getattr(sample, name)
                if values is not None:
                    stream[line, start + 1 : end] = values[1:]
            start = end
    return Batch(tokens=tokens, positions=positions, segments=segments, **streams)


def _length(row: Sequence[Sample]) -> int:
    return sum(len(sample) for sample in row)


def _check(sample: Sample, index: int, context: int) -> None:
    name = f"sample {index}" + (f" ({sample.source})" if sample.source else "")
    if not 0 < len(sample) <= context:
        raise DataError(
            f"{name} has {len(sample)} tokens and a row holds 1 to {context}; raise the context, drop the "
            "sample, or cut it with truncate"
        )
    for stream in STREAMS:
        values = getattr(sample, stream)
        if values is not None and len(values) != len(sample):
            raise DataError(
                f"{name} has {len(sample)} tokens and {len(values)} of {stream}; give one for each"
            )


def _head(sample: Sample, context: int) -> Sample:
    streams = {name: getattr(sample, name) for name in STREAMS}
    cut = {name: None if values is None else values[:context] for name, values in streams.items()}
    return Sample(tokens=sample.tokens[:context], source=sample.source, **cut)


def _round_up(length: int, multiple: int, context: int) -> int:
    return max(length, min(context, -(-length // multiple) * multiple))
