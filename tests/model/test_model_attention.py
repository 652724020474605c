"""Packed rows against one document at a time, by either way of computing them."""

import math

import pytest
import torch

from pensar.model.attention import Packed

LENGTHS = [[60, 40, 28], [100, 28], [128], [90]]  # the last row ends in padding


@pytest.fixture
def segments():
    rows = torch.zeros(4, 128, dtype=torch.int32)
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for number, length in enumerate(lengths, start=1):
            rows[row, begin : begin + length] = number
            begin += length
    return rows


@pytest.fixture(params=["one by one", "masked"])
def call_cost(request, monkeypatch):
    monkeypatch.setattr(Packed, "CALL_COST", 0 if request.param == "one by one" else 10**9)
    return request.param


def _heads(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 128, heads, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def _naive(q, k, v):
    """Causal attention of one document [T, H, h], a query at a time."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows = []
    for t in range(len(q)):
        scores = torch.einsum("hd,shd->hs", q[t], k[: t + 1]) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[: t + 1]))
    return torch.stack(rows)


def test_packed_documents_attend_as_if_alone(segments, call_cost):
    q, k, v = _heads()
    packed = Packed(segments)
    assert (packed.mask is None) == (call_cost == "one by one")
    found = packed(0, q, k, v)
    assert found.shape == q.shape
    with torch.no_grad():
        for row, lengths in enumerate(LENGTHS):
            begin = 0
            for length in lengths:
                part = slice(begin, begin + length)
                expected = _naive(q[row, part], k[row, part], v[row, part])
                torch.testing.assert_close(found[row, part], expected, atol=1e-5, rtol=1e-5)
                begin += length


def test_both_ways_have_the_same_gradients(segments, monkeypatch):
    gradients = []
    for cost in (0, 10**9):
        monkeypatch.setattr(Packed, "CALL_COST", cost)
        q, k, v = _heads()
        out = Packed(segments)(0, q, k, v)
        weight = (
            torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            * (segments != 0)[..., None, None]
        )
        gradients.append(torch.autograd.grad(out, (q, k, v), weight))
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_padding_gives_no_nan_and_no_gradient_to_documents(segments, call_cost):
    q, k, v = _heads()
    segments[2] = 0  # a row that is nothing but padding
    out = Packed(segments)(0, q, k, v)
    assert out.isfinite().all()
    padding = segments == 0
    gradients = torch.autograd.grad(out[padding].sum(), (q, k, v))
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[~padding].any()


def test_whole_rows_need_no_mask_and_no_splitting():
    q, k, v = _heads()
    packed = Packed(torch.ones(4, 128, dtype=torch.int64))
    assert packed.mask is None
    assert packed.runs == []
    assert torch.equal(packed(0, q, k, v), Packed()(0, q, k, v))


def test_crowds_of_short_documents_are_masked_and_long_ones_split():
    short = torch.arange(128).div(4, rounding_mode="floor").expand(4, 128) + 1
    long = torch.arange(512).div(128, rounding_mode="floor").expand(4, 512) + 1
    assert Packed(short).mask is not None
    assert Packed(long).mask is None


def test_the_same_number_in_neighbouring_rows_is_not_one_document(monkeypatch):
    monkeypatch.setattr(Packed, "CALL_COST", 0)
    rows = torch.tensor([[1] * 64 + [2] * 64, [2] * 64 + [3] * 64])
    assert Packed(rows).runs == [(64, True)] * 4


@pytest.mark.parametrize("sparse", [False, True])
def test_a_packed_model_equals_one_that_reads_documents_alone(build, segments, call_cost, sparse):
    model = build(sparse=sparse)
    tokens = torch.randint(96, (4, 128), generator=torch.Generator().manual_seed(3))
    positions = torch.zeros(4, 128, dtype=torch.long)
    for row, lengths in enumerate(LENGTHS):
        positions[row, : sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        together = model(tokens, positions, Packed(segments))
        assert together.isfinite().all()
        for row, lengths in enumerate(LENGTHS):
            begin = 0
            for length in lengths:
                part = slice(begin, begin + length)
                alone = model(tokens[row : row + 1, part], torch.arange(length)[None], Packed())
                torch.testing.assert_close(together[row, part], alone[0], atol=1e-5, rtol=1e-5)
                begin += length
