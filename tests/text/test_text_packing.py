"""Packing: nothing lost, nothing doubled, positions and streams where they belong."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pensar.base.errors import ConfigError, DataError
from pensar.text.packing import STREAMS, Batch, Rows, batches, collate, one_per_row, pack, truncate
from pensar.text.sample import Sample

CONTEXT = 24
lengths = st.lists(st.integers(1, CONTEXT), max_size=40)


def sample_of(length: int, first: int, streams: tuple[str, ...] = ("ce",)) -> Sample:
    """Tokens first, first+1, ...; stream number n holds the tokens plus n/10."""
    tokens = np.arange(first, first + length, dtype=np.int32)
    values = {name: (tokens + (1 + STREAMS.index(name)) / 10).astype(np.float32) for name in streams}
    return Sample(tokens=tokens, source=f"s{first}", **values)


def samples_of(sizes: list[int], streams: tuple[str, ...] = ("ce",)) -> list[Sample]:
    starts = np.cumsum([1, *sizes]).tolist()
    return [sample_of(size, start, streams) for size, start in zip(sizes, starts[:-1], strict=True)]


def segments_of(batch: Batch) -> list[np.ndarray]:
    found = []
    for line in range(len(batch.tokens)):
        for segment in range(1, int(batch.segments[line].max(initial=0)) + 1):
            found.append(batch.tokens[line][batch.segments[line] == segment])
    return found


@settings(deadline=None)
@given(
    sizes=lengths,
    budget=st.integers(1, 100),
    rows=st.sampled_from(Rows),
    seed=st.integers(0, 9),
    multiple=st.integers(1, 8),
)
def test_every_sample_comes_once_and_whole(
    sizes: list[int], budget: int, rows: Rows, seed: int, multiple: int
) -> None:
    samples = samples_of(sizes)
    made = list(batches(samples, budget, context=CONTEXT, rows=rows, seed=seed, multiple=multiple, pad=-1))
    found = Counter(tuple(tokens.tolist()) for batch in made for tokens in segments_of(batch))
    assert found == Counter(tuple(sample.tokens.tolist()) for sample in samples)
    assert sum(batch.num_tokens for batch in made) == sum(sizes)
    for batch in made:
        assert batch.tokens.size <= budget or len(batch.tokens) == 1
        assert batch.tokens.shape[1] <= CONTEXT
        assert (batch.tokens[batch.segments == 0] == -1).all()
        assert all(array.dtype == np.int32 for array in (batch.tokens, batch.positions, batch.segments))


@settings(deadline=None)
@given(sizes=lengths, rows=st.sampled_from(Rows))
def test_positions_restart_and_streams_stay_with_their_tokens(sizes: list[int], rows: Rows) -> None:
    for batch in batches(samples_of(sizes, ("ce", "behaviour")), 60, context=CONTEXT, rows=rows):
        assert batch.pg is None
        assert batch.kl is None
        for line in range(len(batch.tokens)):
            expected, previous, at = [], 0, 0
            for segment in batch.segments[line].tolist():  # a naive twin of the layout
                at = at + 1 if segment == previous and segment else 0
                previous = segment
                expected.append(at)
            assert batch.positions[line].tolist() == expected
        weighted = batch.positions > 0
        for stream, shift in ((batch.ce, 0.1), (batch.behaviour, 0.4)):
            assert stream is not None
            assert stream.dtype == np.float32
            np.testing.assert_allclose(stream[weighted], batch.tokens[weighted] + shift, rtol=1e-6)
            assert not stream[~weighted].any()  # padding, and first tokens, which nothing predicts


@given(sizes=lengths)
def test_best_fit_never_wastes_what_a_naive_search_would_use(sizes: list[int]) -> None:
    def naive(sizes: list[int]) -> list[list[int]]:
        rows: list[list[int]] = []
        for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
            free = [CONTEXT - sum(sizes[other] for other in row) for row in rows]
            fits = [(room, row) for row, room in enumerate(free) if room >= sizes[index]]
            if fits:
                rows[min(fits)[1]].append(index)
            else:
                rows.append([index])
        return rows

    assert pack(samples_of(sizes), context=CONTEXT) == naive(sizes)


def test_batches_depend_on_the_seed_and_on_nothing_else() -> None:
    samples = samples_of([1 + 7 * n % CONTEXT for n in range(60)])

    def tokens(seed: int) -> list[list[list[int]]]:
        return [batch.tokens.tolist() for batch in batches(samples, 96, context=CONTEXT, seed=seed)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)


def test_rows_of_like_length_share_a_batch() -> None:
    samples = samples_of([4, 20] * 28)
    made = list(batches(samples, 80, context=CONTEXT, rows=Rows.SINGLE))
    assert sum(batch.tokens.size for batch in made) == sum(batch.num_tokens for batch in made)
    assert {batch.tokens.shape for batch in made} == {(4, 20), (20, 4), (8, 4)}


def test_one_row_for_each_sample_in_order() -> None:
    batch = one_per_row([sample_of(2, 5), sample_of(3, 7, ("pg",))], pad=99)
    assert batch.tokens.tolist() == [[5, 6, 99], [7, 8, 9]]
    assert batch.segments.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.ce is not None
    assert batch.ce[1].tolist() == [0, 0, 0]
    assert batch.pg is not None
    assert batch.pg[0].tolist() == [0, 0, 0]
    part = batch.rows(slice(1, None, 2))
    assert part.tokens.tolist() == [[7, 8, 9]]
    assert part.pg is not None
    assert part.kl is None
    assert one_per_row([]).tokens.shape == (0, 0)


def test_long_samples_are_refused_or_cut_and_counted() -> None:
    samples = [sample_of(30, 1, STREAMS), sample_of(5, 40)]
    with pytest.raises(DataError, match=r"sample 0 \(s1\) has 30 tokens and a row holds 1 to 24"):
        pack(samples, context=CONTEXT)
    cut, num_cut = truncate(samples, CONTEXT)
    assert num_cut == 1
    assert cut[1] is samples[1]
    assert cut[0].source == "s1"
    for name in ("tokens", *STREAMS):
        assert getattr(cut[0], name).tolist() == getattr(samples[0], name)[:CONTEXT].tolist()


def test_samples_and_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match="sample 0 has 0 tokens"):
        pack([Sample(tokens=np.zeros(0, np.int32))], context=8)
    with pytest.raises(DataError, match="3 tokens and 2 of kl"):
        pack([Sample(tokens=np.zeros(3, np.int32), kl=np.zeros(2, np.float32))], context=8)
    with pytest.raises(ConfigError, match="context 0"):
        pack([], context=0)
    with pytest.raises(ConfigError, match="tokens_per_batch 0"):
        next(batches([], 0, context=8))
    with pytest.raises(DataError, match="row 0 has 5 tokens"):
        collate([[sample_of(5, 1)]], length=4)
