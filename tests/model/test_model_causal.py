"""Attention in blocks equals the formula in float64, gradients too, for any length and number of heads."""

import pytest
import torch

from pensar.model import attention, native
from pensar.model.attention import Packed
from pensar.model.causal import BLOCK, causal_attention
from pensar.model.flash import masked


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


def mixed(inputs, queries=torch.float32, values=torch.bfloat16):
    """Queries and keys in a type of their own."""
    types = (queries, queries, values)
    return [x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, types, strict=True)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 32), (4, 2, 64), (6, 1, 96)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.02), (torch.float32, 2e-6)], ids=str)
def test_it_errs_by_no_more_than_rounding(whose, length, heads, kv_heads, size, dtype, most):
    exact = drawn(length, heads, kv_heads, size)
    expected = formula(*exact)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, exact, grad)
    ours = mixed(exact, values=dtype)
    found = causal_attention(*ours)
    gradients = torch.autograd.grad(found, ours, grad.to(dtype))
    assert found.dtype == dtype
    assert [x.dtype for x in gradients] == [x.dtype for x in ours]
    scale = expected.norm()
    for mine, other in zip((found, *gradients), (expected, *wanted), strict=True):
        # The gradient of the scores of a single token is zero, and rounding is not.
        assert (mine - other).norm() <= most * max(other.norm(), 0.2 * scale)


def test_its_gradients_err_less_than_the_fused_kernels(whose):
    exact = drawn(300, 4, 2, 64)
    grad = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(formula(*exact), exact, grad)

    def error(attend, inputs):
        gradients = torch.autograd.grad(attend(*inputs), inputs, grad.bfloat16())
        return sum(float((mine - other).norm()) for mine, other in zip(gradients, wanted, strict=True))

    ours = error(causal_attention, mixed(exact))
    assert ours < error(lambda q, k, v: masked(q, k, v, None), mixed(exact, torch.bfloat16))


def test_what_is_not_a_number_stays_visible(whose):
    q, k, v = mixed(drawn(150, 2, 1, 32))
    with torch.no_grad():
        k[0, 90] = torch.nan
        found = causal_attention(q, k, v)
    assert found[0, 90:].isnan().all()
    assert found[0, : 90 if whose == "kernels" else BLOCK].isfinite().all()
    assert found[1].isfinite().all()


def test_in_bfloat16_it_is_an_operator_too(whose):
    torch.library.opcheck(causal_attention, mixed(drawn(BLOCK + 3, 4, 2, 32)))


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


@pytest.mark.parametrize("grad", [True, False])
def test_under_autocast_documents_of_any_length_are_our_kernels(monkeypatch, grad):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    if not native.takes(torch.bfloat16):
        pytest.skip("this processor does not multiply pairs of bfloat16, or better than our kernels would")
    calls = []

    def counted(*inputs):
        calls.append(inputs[0].shape[1])
        return causal_attention(*inputs)

    monkeypatch.setattr(attention, "causal_attention", counted)
    inputs = mixed(drawn(300, 4, 2, 32))
    segments = torch.tensor([[1] * 120 + [2] * 180, [1] * 200 + [0] * 100])
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        found = Packed(segments)(0, *inputs)
    assert calls == [120, 180, 200]
    wide = [x.float() for x in inputs]
    expected = Packed(segments)(0, *wide)
    assert (found[0] - expected[0]).norm() <= 0.01 * expected[0].norm()


def test_the_kernels_refuse_inputs_that_do_not_fit():
    q, k, v = (x.detach().float() for x in drawn(40, 6, 3, 32))
    native.Attention(q, k, v)
    for bad, text in (
        ((q, k[:, :-1], v), "and not"),
        ((q, k[:1], v), "and not"),
        ((q[:, :, :4], k, v), "evenly"),
    ):
        with pytest.raises(ValueError, match=text):
            native.Attention(*bad)


def test_it_compiles_whole():
    q, k, v = (x.detach() for x in drawn(300, 4, 2, 64, torch.float32))
    attend = torch.compile(lambda q, k, v: Packed()(0, q, k, v), fullgraph=True, backend="eager")
    torch.testing.assert_close(attend(q, k, v), Packed()(0, q, k, v))
