"""Experts taken one by one equal the formula in float64, gradients too, however the tokens are spread over them."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pensar.model import moe
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


def test_it_is_an_operator_that_compilers_and_shape_propagation_understand():
    chosen, values = drawn("any", torch.float32)
    torch.library.opcheck(routed_swiglu, taken(chosen, *values))


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
    x = torch.randn(64 * layer.num_experts // layer.k, 48)
    found, mine = gradients(layer, x)
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(layer(x), found)
    monkeypatch.setattr(moe, "ROWS_OF_ONE_OPERATOR", 10**9)
    expected, others = gradients(layer, x)
    assert len(calls) == 1
    assert torch.equal(found, expected)
    for got, want in zip(mine, others, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()


def test_few_tokens_frozen_experts_other_types_and_other_experts_go_their_own_way(layer, calls):
    x = torch.randn(64 * layer.num_experts // layer.k, 48)
    layer(x[1:])
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
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
