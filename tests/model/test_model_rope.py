"""Rotary embedding and YaRN against complex numbers and the paper's formula in NumPy."""

import math

import numpy as np
import pytest
import torch

from pensar.model import rope
from pensar.model.config import Yarn
from pensar.model.sizes import SIZES


def test_rotation_is_multiplication_by_a_unit_complex_number(shape):
    config = shape(rope_theta=10_000.0)
    positions = torch.tensor([[0, 1, 7, 500]])
    cos, sin = rope.tables(positions, *rope.frequencies(config))
    x = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    turned = rope.rotate(x, cos, sin).numpy()
    pairs = x[..., :8].numpy() + 1j * x[..., 8:].numpy()
    angles = positions.numpy()[..., None, None] * 10_000.0 ** (-np.arange(8) / 8)
    expected = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., :8], expected.real, atol=2e-5)
    np.testing.assert_allclose(turned[..., 8:], expected.imag, atol=2e-5)


def test_scores_depend_on_the_distance_only(shape):
    inverse, factor = rope.frequencies(shape())
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(left, right):
        tables = [rope.tables(torch.tensor([[place]]), inverse, factor) for place in (left, right)]
        return float((rope.rotate(q, *tables[0]) * rope.rotate(k, *tables[1])).sum())

    assert score(105, 100) == pytest.approx(score(5, 0), abs=1e-5)


def test_yarn_is_the_formula_of_its_paper(shape):
    yarn = Yarn(factor=4.0, original_max_positions=32_768)
    found, factor = rope.frequencies(shape(head_dim=128, rope_scaling=yarn))
    pair = np.arange(64)
    plain = 1_000_000.0 ** (-pair / 64)
    # Pairs that turn more than 32 times within the original context stay, those under one turn are stretched;
    # the released models' ramp lies between pairs 23 and 40.
    ramp = np.clip((pair - 23) / (40 - 23), 0, 1)
    np.testing.assert_allclose(found.numpy(), plain * (1 - ramp) + plain / 4 * ramp, rtol=2e-6)
    turns = 32_768 * plain / (2 * math.pi)
    assert turns[23] > 32 > turns[24]
    assert turns[39] > 1 > turns[40]
    assert factor == pytest.approx(1.138629, abs=1e-6)
    cos, sin = rope.tables(torch.tensor([[3]]), found, factor)
    np.testing.assert_allclose((cos**2 + sin**2).numpy(), factor**2, rtol=1e-5)


def test_a_given_attention_factor_replaces_the_formula(shape):
    yarn = Yarn(factor=4.0, original_max_positions=64, attention_factor=1.0)
    assert rope.frequencies(shape(rope_scaling=yarn))[1] == 1.0
    assert rope.frequencies(shape(rope_scaling=Yarn(factor=1.0, original_max_positions=64)))[1] == 1.0


def test_official_models_use_the_raised_base():
    assert {SIZES[name].rope_theta for name in SIZES if not name.startswith("tiny")} == {1_000_000.0}


def test_tables_made_while_serving_can_be_trained_on(build, logits_of):
    model = build().train()
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode():
        logits_of(model, tokens)
    logits_of(model, tokens).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
