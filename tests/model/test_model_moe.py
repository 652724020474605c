"""The mixture of experts and its balance loss against NumPy and against naive loops."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pensar.model import moe
from pensar.model.attention import Packed
from pensar.model.moe import (
    SparseMLP,
    balance_loss,
    expert_counts,
    grouped,
    router_z_loss,
    routings,
)


@pytest.fixture
def layer(shape):
    torch.manual_seed(0)
    mlp = SparseMLP(shape(sparse=True))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mlp.train()


def test_every_token_gets_its_best_experts_weighted_by_the_router(layer):
    x = torch.randn(2, 7, 48)
    got = layer(x)
    for row in range(2):
        for place in range(7):
            token = x[row, place]
            probabilities = torch.softmax(layer.gate.weight @ token, dim=0)
            best = probabilities.argsort(descending=True)[:2]
            expected = torch.zeros(48)
            for expert in best:
                gate, up = (layer.experts.gate_up_proj[expert] @ token).split(24)
                out = layer.experts.down_proj[expert] @ (F.silu(gate) * up)
                expected += out * probabilities[expert] / probabilities[best].sum()
            torch.testing.assert_close(got[row, place], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "width", "tolerance"),
    [
        (torch.float32, 24, 1e-5),
        (torch.bfloat16, 24, 3e-2),
        (torch.float64, 24, 1e-12),
        (torch.float32, 6, 1e-5),
    ],
)
def test_grouped_product_equals_one_product_a_row(dtype, width, tolerance):
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 5, 1, 0])
    x = torch.randn(9, width, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(5, 8, width, generator=generator).to(dtype).requires_grad_()
    owner = torch.repeat_interleave(torch.arange(5), counts)
    weight = torch.randn(9, 8, generator=generator).to(dtype)
    found = grouped(x, w, counts)
    expected = torch.einsum("md,mod->mo", x, w[owner])
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for got, want in zip(
        torch.autograd.grad(found, (x, w), weight), torch.autograd.grad(expected, (x, w), weight), strict=True
    ):
        torch.testing.assert_close(got, want, atol=tolerance * 4, rtol=tolerance * 4)


def test_fused_and_separate_products_agree(layer, monkeypatch):
    x = torch.randn(33, 48)
    fused = layer(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layer(x), fused, atol=1e-6, rtol=1e-5)


def test_balance_loss_is_the_formula_over_each_layer(build):
    model = build(sparse=True).train()
    tokens = torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(2))
    model(tokens, torch.arange(16).expand(3, 16), Packed())
    layers = routings(model)
    losses = []
    for routing in layers:
        probabilities = routing.probabilities.detach().double().numpy()
        chosen = np.argsort(-probabilities, axis=1)[:, :2]
        f = np.bincount(chosen.ravel(), minlength=8) / (2 * len(probabilities))
        losses.append(8 * np.sum(f * probabilities.mean(axis=0)))
    found = balance_loss(layers, expert_counts(layers)).detach()
    assert len(losses) == 3
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-6)


def test_balance_loss_is_one_at_balance_and_experts_over_k_at_collapse():
    chosen, log_z = torch.zeros(8, 2, dtype=torch.long), torch.zeros(8)
    even = moe.Routing(torch.full((8, 4), 0.25), torch.full((4,), 4), chosen, log_z)
    collapsed = moe.Routing(
        torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(8, 1), torch.tensor([8, 8, 0, 0]), chosen, log_z
    )
    assert float(balance_loss([even], expert_counts([even]))) == pytest.approx(1.0)
    assert float(balance_loss([collapsed], expert_counts([collapsed]))) == pytest.approx(2.0)
    # Two half-collapsed layers do not excuse each other.
    other = moe.Routing(collapsed.probabilities.flip(1), collapsed.counts.flip(0), chosen, log_z)
    layers = [collapsed, other]
    assert float(balance_loss(layers, expert_counts(layers))) == pytest.approx(2.0)


def test_micro_batches_with_global_counts_add_up_to_the_gradient_of_the_whole_batch(layer):
    # Micro-batches that differ much: their own frequencies would give another gradient.
    batches = [torch.randn(12, 48) + 2 * torch.randn(48) for _ in range(4)]
    layer(torch.cat(batches))
    whole = balance_loss([layer.routing], expert_counts([layer.routing]))
    expected = torch.autograd.grad(whole, layer.gate.weight)[0]

    counts = torch.zeros(1, 8)
    for batch in batches:
        layer(batch)
        counts += expert_counts([layer.routing])
    total, gradient, alone = 0.0, torch.zeros_like(expected), torch.zeros_like(expected)
    for batch in batches:
        layer(batch)
        part = balance_loss([layer.routing], counts)
        total += float(part.detach())
        gradient += torch.autograd.grad(part, layer.gate.weight, retain_graph=True)[0]
        local = balance_loss([layer.routing], expert_counts([layer.routing])) / 4
        alone += torch.autograd.grad(local, layer.gate.weight)[0]
    assert total == pytest.approx(float(whole.detach()), rel=1e-6)
    assert (gradient - expected).norm() / expected.norm() < 1e-6
    assert (alone - expected).norm() / expected.norm() > 0.1


def test_padding_does_not_count(layer):
    x = torch.randn(20, 48)
    real = torch.ones(20, dtype=torch.bool)
    real[13:] = False
    layer(x[:13])
    expected = balance_loss([layer.routing], expert_counts([layer.routing]))
    layer(x)
    counts = expert_counts([layer.routing], real)
    assert counts.sum() == 13 * 2
    torch.testing.assert_close(balance_loss([layer.routing], counts, real_N=real), expected)


def test_counts_of_another_batch_do_not_change_the_scale(layer):
    layer(torch.randn(16, 48))
    counts = expert_counts([layer.routing])
    exact = balance_loss([layer.routing], counts)
    torch.testing.assert_close(balance_loss([layer.routing], counts * 3, num_tokens=16), exact)


def test_router_z_loss_is_the_formula_and_so_is_its_gradient(layer):
    """ST-MoE, equation 5; d/dx_e of log^2 Z is 2 log Z p_e."""
    x = torch.randn(20, 48) * 3
    real = torch.ones(20, dtype=torch.bool)
    real[13:] = False
    layer(x)
    loss = router_z_loss([layer.routing], real_N=real, num_tokens=26)
    weight, tokens = layer.gate.weight.detach().double().numpy(), x[:13].double().numpy()
    logits = tokens @ weight.T
    log_z = np.log(np.exp(logits).sum(1))
    assert float(loss.detach()) == pytest.approx((log_z**2).sum() / 26, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, layer.gate.weight)
    expected = (2 * log_z[:, None] * np.exp(logits - log_z[:, None])).T @ tokens / 26
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-4)
    layer(x)
    alone = router_z_loss([layer.routing, layer.routing], real_N=real)
    assert float(alone.detach()) == pytest.approx((log_z**2).mean(), rel=1e-5)


def test_routing_is_kept_in_training_only(layer):
    layer(torch.randn(4, 48))
    assert layer.routing is not None
    layer.eval()(torch.randn(4, 48))
    assert layer.routing is None
    assert routings(layer) == []


def test_a_layer_can_be_copied_after_a_training_step(layer):
    x = torch.randn(4, 48)
    expected = layer(x)
    again = copy.deepcopy(layer)
    assert again.routing is None
    assert torch.equal(again(x), expected)
