"""Experts taken one by one equal the formula in float64, gradients too, however the tokens are spread over them."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pensar.base.native import built, opened
from pensar.model import moe, native
from pensar.model.moe import SparseMLP
from pensar.model.quantized import Int8, OpenExperts
from pensar.model.routed import routed_swiglu

EXPERTS, HIDDEN, WIDTH, TOKENS, K = 6, 16, 8, 20, 2
NAMES = ["tokens", "weights", "gate and up", "down"]


def drawn(spread, dtype=torch.float64):
    """Tokens, weights, matrices; and who goes where: any two experts, none to the last three, or all to the same."""
    generator = torch.Generator().manual_seed(0)
    used = {"any": EXPERTS, "some": EXPERTS - 3, "same": K}[spread]
    chosen = torch.stack([torch.randperm(used, generator=generator)[:K] for _ in range(TOKENS)])
    shapes = [(TOKENS, HIDDEN), (TOKENS, K), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
    values = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return chosen, values


def taken(chosen, x, weights, gate_up, down):
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    return x, weights, order, counts, gate_up, down


def formula(chosen, x, weights, gate_up, down):
    gate, up = torch.einsum("nd,nkod->nko", x, gate_up[chosen]).chunk(2, -1)
    return torch.einsum("nki,nkdi,nk->nd", F.silu(gate) * up, down[chosen], weights)


@pytest.mark.parametrize("spread", ["any", "some", "same"])
def test_outputs_and_gradients_are_the_formulas(spread):
    chosen, values = drawn(spread)
    found, expected = routed_swiglu(*taken(chosen, *values))[0], formula(chosen, *values)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = zip(
        NAMES,
        torch.autograd.grad(found, values, grad),
        torch.autograd.grad(expected, values, grad),
        strict=True,
    )
    for name, mine, other in pairs:
        torch.testing.assert_close(
            mine, other, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: name + text
        )


WHOLE = 32
"""A width that our own kernels take."""


def mixed(counts, seed=0, dtype=torch.bfloat16):
    """Inputs of experts with so many rows each, tokens in a type of their own and matrices in float32; a gradient."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)])
    chosen = experts[torch.randperm(len(experts), generator=generator)].view(-1, 2)
    x = torch.randn(len(chosen), 2 * WHOLE, generator=generator).to(dtype)
    weights = torch.rand(len(chosen), 2, generator=generator)
    gate_up, down = (
        torch.randn(len(counts), *shape, generator=generator) * 0.2
        for shape in ((2 * WHOLE, 2 * WHOLE), (2 * WHOLE, WHOLE))
    )
    return chosen, [x, weights, gate_up, down], torch.randn(x.shape, generator=generator)


def of_experts(chosen, values):
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(values[2]))
    return values[0], values[1], order, counts, *values[2:]


COUNTS = [[8, 16, 32, 40], [1, 7, 9, 31, 0, 33, 63], [0, 0, 130, 0], [2]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.03), (torch.float32, 2e-6)], ids=str)
def test_it_errs_by_no_more_than_rounding(whose, counts, dtype, most):
    chosen, values, grad = mixed(counts, dtype=dtype)
    exact = [value.double().requires_grad_() for value in values]
    expected = formula(chosen, *exact)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    ours = [value.clone().requires_grad_() for value in values]
    found = routed_swiglu(*of_experts(chosen, ours))[0]
    gradients = torch.autograd.grad(found, ours, grad)
    assert found.dtype == torch.float32
    assert [x.dtype for x in gradients] == [x.dtype for x in values]
    for name, mine, other in zip(["output", *NAMES], (found, *gradients), (expected, *wanted), strict=True):
        assert (mine - other).norm() <= most * other.norm(), name


def test_an_expert_without_rows_gets_zeros_for_a_gradient(whose):
    chosen, values, grad = mixed([5, 0, 11])
    ours = [value.requires_grad_() for value in values]
    _, _, gate_up, down = torch.autograd.grad(routed_swiglu(*of_experts(chosen, ours))[0], ours, grad)
    assert not gate_up[1].any()
    assert not down[1].any()
    assert gate_up[0].any()


def test_what_is_not_a_number_stays_visible(whose):
    chosen, values, _ = mixed([8, 8])
    values[0][3, 5] = torch.nan
    assert routed_swiglu(*of_experts(chosen, values))[0][3].isnan().all()


def test_who_goes_back_need_not_have_gone_forward(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    if not native.takes(torch.bfloat16):
        pytest.skip("this processor does not multiply pairs of bfloat16, or better than our kernels would")
    chosen, values, grad = mixed([7, 9])
    ours = [value.requires_grad_() for value in values]
    expected = torch.autograd.grad(routed_swiglu(*of_experts(chosen, ours))[0], ours, grad)
    found = routed_swiglu(*of_experts(chosen, ours))[0]
    with monkeypatch.context() as patched:
        patched.setattr(native, "takes", lambda dtype, *widths: False)
        gradients = torch.autograd.grad(found, ours, grad)
    for mine, other in zip(gradients, expected, strict=True):
        assert (mine - other).norm() <= 0.03 * other.norm()


@pytest.mark.parametrize("place", range(6))
def test_inputs_that_do_not_fit_are_refused(place):
    """The kernels look at nothing but addresses."""
    inputs = list(of_experts(*mixed([7, 9])[:2]))
    room = torch.empty(16, 2 * WHOLE, dtype=torch.bfloat16)
    native.Experts(*inputs, room)
    fitting = inputs[place]
    inputs[place] = fitting.to(torch.float64 if fitting.is_floating_point() else torch.int32)
    with pytest.raises(ValueError, match="and not torch"):
        native.Experts(*inputs, room)
    inputs[place] = fitting[:-1]
    with pytest.raises(ValueError, match="and not torch"):
        native.Experts(*inputs, room)


class Library:
    """One that was built for a processor with units for some types."""

    def __init__(self, halves):
        self.halves = halves

    def pensar_takes(self, halves):
        return int(self.halves or not halves)


def test_odd_widths_other_types_and_several_threads_are_the_librarys(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: Library(halves=True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert native.takes(torch.bfloat16, 64, 32)
    assert native.takes(torch.float32, 64, 32)
    assert not native.takes(torch.float64, 64, 32)
    assert not native.takes(torch.bfloat16, 64, 48)
    monkeypatch.setattr(native, "library", lambda: Library(halves=False))
    assert not native.takes(torch.bfloat16, 64, 32)
    assert native.takes(torch.float32, 64, 32)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not native.takes(torch.float32, 64, 32)
    monkeypatch.setattr(native, "library", lambda: Library(halves=True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not native.takes(torch.float32, 64, 32)


@pytest.mark.parametrize(
    ("flags", "known"),
    [(("-DPENSAR_GENERIC",), (0, 0)), (("-mno-avx512bf16",), (1, 0))],
    ids=["portable", "avx512"],
)
@pytest.mark.slow
def test_on_other_processors_it_says_what_it_takes(tmp_path, flags, known):
    if native.library() is None or not native.library().pensar_takes(1):
        pytest.skip("the variants are those of x86-64 with AVX-512 and bfloat16")
    other = opened(built(native.HEADERS / "train.cpp", tmp_path, extra=flags), {})
    assert (other.pensar_takes(0), other.pensar_takes(1)) == known


def test_it_is_an_operator_that_compilers_and_shape_propagation_understand():
    chosen, values = drawn("any", torch.float32)
    torch.library.opcheck(routed_swiglu, taken(chosen, *values))


def test_in_bfloat16_it_is_one_too(whose):
    chosen, values, _ = mixed([8, 40])
    torch.library.opcheck(routed_swiglu, of_experts(chosen, [value.requires_grad_() for value in values]))


@pytest.fixture
def layer(shape):
    torch.manual_seed(0)
    mlp = SparseMLP(shape(sparse=True))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mlp.train()


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def counted(*inputs):
        seen.append(inputs)
        return routed_swiglu(*inputs)

    monkeypatch.setattr(moe, "routed_swiglu", counted)
    return seen


def gradients(layer, x):
    layer.zero_grad()
    out = layer(x)
    out.square().sum().backward()
    return out.detach(), [p.grad for p in layer.parameters()]


def test_training_takes_it_with_many_tokens_and_agrees_with_grouped_products(layer, calls, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    x = torch.randn(64 * layer.num_experts // layer.k, 48)
    found, mine = gradients(layer, x)
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), found)
    assert len(calls) == 1
    layer.train()
    monkeypatch.setattr(moe, "ROWS_OF_ONE_OPERATOR", 10**9)
    expected, others = gradients(layer, x)
    assert len(calls) == 1
    assert torch.equal(found, expected)
    for got, want in zip(mine, others, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()


def test_training_under_autocast_takes_it_in_bfloat16(layer, calls, whose):
    x = torch.randn(64 * layer.num_experts // layer.k, 48)
    expected, others = gradients(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, mine = gradients(layer, x)
    assert [inputs[0].dtype for inputs in calls] == [torch.float32, torch.bfloat16]
    assert (found - expected).norm() < 0.02 * expected.norm()
    for got, want in zip(mine, others, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_pass_without_gradients_has_the_bits_of_training(layer, whose, autocast):
    """The experts' shares of a step are counted in one, and a teacher's scores come from one."""
    x = torch.randn(64 * layer.num_experts // layer.k, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            expected = layer(x)
        assert torch.equal(layer(x), expected)


def test_few_tokens_and_frozen_experts_are_in_autocasts_type_too(layer):
    x = torch.randn(64 * layer.num_experts // layer.k, 48)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        few = layer(x[:50])
        layer.experts.requires_grad_(False)
        frozen = layer(x)
    wide = layer(x)
    for found, other in ((few, expected[:50]), (frozen, expected)):
        assert found.dtype == torch.float32
        assert (found - other).norm() < 0.01 * other.norm()
    assert (frozen - wide).norm() > 1e-3 * wide.norm()


def test_a_float64_layer_stays_one_under_autocast(layer):
    layer.double()
    x = torch.randn(64 * layer.num_experts // layer.k, 48, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_few_tokens_frozen_experts_other_types_and_other_experts_go_their_own_way(layer, calls):
    x = torch.randn(64 * layer.num_experts // layer.k, 48)
    layer(x[1:])
    copy.deepcopy(layer).bfloat16()(x.bfloat16())
    frozen = copy.deepcopy(layer)
    frozen.experts.requires_grad_(False)
    frozen(x)
    few_bits = copy.deepcopy(layer)
    few_bits.experts = OpenExperts(Int8(layer.experts.gate_up_proj), Int8(layer.experts.down_proj))
    few_bits(x)
    assert calls == []


def test_recomputing_gives_the_same_gradients(layer, calls):
    x = torch.randn(64 * layer.num_experts // layer.k, 48)
    _, expected = gradients(layer, x)
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert len(calls) == 3
    for parameter, want in zip(layer.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, want)
