"""Attention in blocks equals the formula in float64, gradients too, for any length and number of heads."""

import pytest
import torch

from pensar.model import attention
from pensar.model.attention import Packed
from pensar.model.causal import BLOCK, causal_attention


def drawn(length, heads, kv_heads, size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, length, heads, size), (2, length, kv_heads, size), (2, length, kv_heads, size)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def formula(q_BTHh, k_BTKh, v_BTKh):
    group = q_BTHh.shape[2] // k_BTKh.shape[2]
    k_BTHh, v_BTHh = (x.repeat_interleave(group, 2) for x in (k_BTKh, v_BTKh))
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHh, k_BTHh) / q_BTHh.shape[-1] ** 0.5
    future = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores_BHTS.masked_fill(future, -torch.inf).softmax(-1), v_BTHh)


LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_outputs_and_gradients_are_the_formulas(length, heads, kv_heads):
    ours, theirs = drawn(length, heads, kv_heads, 8), drawn(length, heads, kv_heads, 8)
    found, expected = causal_attention(*ours), formula(*theirs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(grad)
    expected.backward(grad)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-11)


def test_it_is_an_operator_that_compilers_and_shape_propagation_understand():
    inputs = drawn(BLOCK + 3, 4, 2, 16, torch.float32)
    torch.library.opcheck(causal_attention, inputs)


def test_it_reads_strided_inputs():
    q, k, v = (x.detach() for x in drawn(100, 4, 2, 8))
    joined = torch.cat([q, k, v], 2)
    torch.testing.assert_close(causal_attention(*joined.split([4, 2, 2], 2)), causal_attention(q, k, v))


@pytest.mark.parametrize("length", [256, 300])
def test_training_takes_it_and_agrees_with_the_fused_kernel(monkeypatch, length):
    calls = []

    def counted(*inputs):
        calls.append(inputs)
        return causal_attention(*inputs)

    monkeypatch.setattr(attention, "causal_attention", counted)
    q, k, v = drawn(length, 4, 2, 64, torch.float32)
    found = Packed()(0, q, k, v)
    assert len(calls) == 1
    with torch.no_grad():
        expected = Packed()(0, q, k, v)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
