"""Muon against the singular value decomposition, AdamW where it belongs, and the schedules by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from pensar.base.errors import RunError
from pensar.base.ranks import World
from pensar.train.optimizer import Optimizer, OptimizerConfig, orthogonalize
from pensar.train.schedule import ScheduleConfig, rate
from tiny import SPARSE, tiny_model

SHAPES = [(24, 24), (16, 40), (40, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalising_keeps_the_singular_vectors_and_maps_each_value_by_the_polynomial(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    values = s / (np.linalg.norm(s) + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = orthogonalize(matrix[None])[0].numpy()
    np.testing.assert_allclose(found, u @ np.diag(values) @ vt, atol=1e-10)
    # Values above a hundredth of the norm come close to one: the result is U V^T but for their spread.
    assert np.all((values > 0.6) & (values < 1.3))
    product = u.T @ found @ vt.T
    assert np.abs(product - np.diag(np.diag(product))).max() < 1e-10


@pytest.mark.parametrize("muon", [True, False])
def test_every_changed_weight_is_seen_to_have_changed(muon: bool) -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig(muon=muon))
    before = [(parameter.detach().clone(), parameter._version) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0, World())
    for parameter, (values, version) in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, values)
        assert parameter._version > version


def test_a_batch_of_matrices_is_orthogonalised_one_by_one() -> None:
    matrices = torch.randn((3, 8, 20), generator=torch.Generator().manual_seed(1))
    together = orthogonalize(matrices)
    for alone, one in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalize(alone[None])[0], one)


def test_muon_moves_block_matrices_along_the_orthogonalised_momentum_and_adamw_the_rest() -> None:
    model = tiny_model(**SPARSE)
    config = OptimizerConfig(clip_norm=1e9, lr=0.01, adamw_lr=0.003)
    optimizer = Optimizer(model, config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.grad = noise.clone()
        gradients[name] = noise
    norm = optimizer.step(0.5, World())
    assert norm == pytest.approx(sum(float((g**2).sum()) for g in gradients.values()) ** 0.5, rel=1e-5)
    for name, parameter in model.named_parameters():
        change = parameter.detach() - before[name]
        if ".layers." in name and parameter.dim() >= 2 and "mlp.gate.weight" not in name:
            rows, columns = parameter.shape[-2:]
            direction = gradients[name] * (1 + 0.95)
            update = orthogonalize(direction.reshape(-1, rows, columns)).view_as(direction)
            expected = -0.01 * 0.5 * 0.2 * max(rows, columns) ** 0.5 * update
        else:
            # AdamW's first step: both moments are bias-corrected to the gradient itself.
            expected = -0.003 * 0.5 * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-6)
        assert parameter.grad is None


def test_everything_goes_to_adamw_when_muon_is_off_and_norms_never_decay() -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig(muon=False, weight_decay=0.1, adamw_lr=0.01))
    assert not optimizer.groups
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0, World())
    for name, parameter in model.named_parameters():
        shrunk = before[name] * (1 - 0.01 * 0.1) if parameter.dim() >= 2 else before[name]
        torch.testing.assert_close(parameter.detach(), shrunk)


def test_gradients_are_clipped_to_the_norm() -> None:
    a, b = tiny_model(), tiny_model()
    config = OptimizerConfig(muon=False, clip_norm=1.0)
    first, second = Optimizer(a, config), Optimizer(b, config)
    size = sum(parameter.numel() for parameter in a.parameters()) ** 0.5
    for parameter, other in zip(a.parameters(), b.parameters(), strict=True):
        parameter.grad = torch.full_like(parameter, 50.0)
        other.grad = torch.full_like(other, 1 / size)
    assert first.step(1.0, World()) == pytest.approx(50 * size, rel=1e-4)
    assert second.step(1.0, World()) == pytest.approx(1.0, rel=1e-4)
    for parameter, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(value: float) -> None:
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).grad[0, 0] = value  # type: ignore[index]
    with pytest.raises(RunError, match=r"gradient's norm is (nan|inf); lower the learning rate"):
        optimizer.step(1.0, World())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


# ---------------------------------------------------------------- schedules


def test_warm_up_stable_decay_by_hand() -> None:
    schedule = ScheduleConfig(warmup=0.05, decay=0.2)
    rates = [rate(schedule, step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:80] == pytest.approx([1.0] * 76)
    assert rates[80:83] == pytest.approx([0.96, 0.91, 0.86])
    assert rates[89] == pytest.approx(0.51)
    assert rates[99] == pytest.approx(0.01)
    assert all(a >= b for a, b in pairwise(rates[5:]))


def test_a_stage_that_goes_on_starts_and_ends_where_it_is_told() -> None:
    schedule = ScheduleConfig(warmup=0.0, decay=0.5, start=0.4, final=0.1)
    rates = [rate(schedule, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.4)
    assert rates[499] == pytest.approx(0.4)
    assert rates[749] == pytest.approx(0.1 + 0.3 * 0.501)
    assert rates[999] == pytest.approx(0.1 + 0.3 * 0.001)


def test_the_cosine_is_half_way_in_the_middle_and_ends_at_the_final_rate() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup=0.2, final=0.1)
    rates = [rate(schedule, step, 10) for step in range(10)]
    assert rates[0] == pytest.approx(0.5)
    assert rates[1] == pytest.approx(1.0)
    assert rates[5] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[9] == pytest.approx(0.1)


def test_a_constant_rate_is_constant_after_the_warm_up() -> None:
    assert [rate(ScheduleConfig(kind="constant", warmup=0.0), step, 3) for step in range(3)] == [1.0] * 3
    assert [rate(ScheduleConfig(warmup=0.0, decay=0.0), step, 3) for step in range(3)] == [1.0] * 3
    assert rate(ScheduleConfig(kind="constant", warmup=0.5), 0, 4) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_rates_are_never_zero_before_the_end_and_never_above_one(kind: str, num_steps: int) -> None:
    schedule = ScheduleConfig(kind=kind)  # type: ignore[arg-type]
    rates = [rate(schedule, step, num_steps) for step in range(num_steps)]
    assert all(0 < value <= 1 for value in rates[:-1])
    assert 0 <= rates[-1] <= 1
