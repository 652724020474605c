"""Weights in few bits: the published codebook, error, memory, and gradients equal to those of the whole weight."""

import copy
import gc
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pensar.base.errors import ConfigError
from pensar.model import quantized
from pensar.model.lora import LoraConfig, adapt, merged
from pensar.model.moe import Experts, grouped
from pensar.model.quantized import Int8, Nf4, Quantized, codebook, quantize
from pensar.train.recompute import recomputed

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""arXiv 2305.14314, appendix E."""
KINDS = {"int8": Int8, "nf4": Nf4}
every_kind = pytest.mark.parametrize("bits", KINDS)
TOKENS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(5))


def normal(*shape, seed=0, scale=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------- the values


def test_the_codebook_is_the_published_one():
    assert (codebook() - torch.tensor(PUBLISHED, dtype=torch.float64)).abs().max() < 1e-6


def test_the_codebook_s_values_are_quantiles_of_the_normal_distribution():
    """By the standard library's inverse, and by the probability that lies between two values."""
    d = (1 / 32 + 1 / 30) / 2
    end = NormalDist().inv_cdf(1 - d)
    below = [NormalDist().inv_cdf(d + i * (0.5 - d) / 7) / end for i in range(8)]
    above = [NormalDist().inv_cdf(0.5 + i * (0.5 - d) / 8) / end for i in range(1, 9)]
    assert np.allclose(codebook().numpy(), [*below, *above], rtol=0, atol=1e-14)
    probabilities = np.diff([0.5 * (1 + math.erf(value * end / 2**0.5)) for value in codebook().tolist()])
    assert np.allclose(probabilities[:7], (0.5 - d) / 7)
    assert np.allclose(probabilities[7:], (0.5 - d) / 8)


def test_nf4_takes_the_nearest_value_of_each_block():
    """Against the definition, value by value, with the scales that the weight itself states."""
    weight = normal(6, 96)
    weight[0, :64] = 0
    values = Nf4(weight).whole().flatten().double().numpy()
    table = np.array(PUBLISHED)
    for block in range(9):
        mine = weight.flatten()[64 * block : 64 * (block + 1)].double().numpy()
        found, largest = values[64 * block : 64 * (block + 1)], np.abs(mine).max()
        if largest == 0:
            assert (found == 0).all()
            continue
        nearest = table[np.abs(mine[:, None] / largest - table).argmin(1)]
        scale = np.abs(found).max()
        assert abs(scale / largest - 1) < 0.05, "what double quantisation costs"
        assert np.allclose(found, nearest * scale, rtol=1e-5, atol=1e-9)


def test_int8_rounds_each_row_to_127_steps():
    weight = normal(5, 33, scale=1.0)
    weight[2] = 0
    weight[3] *= 1e4
    step = weight.abs().amax(1, keepdim=True) / 127
    whole = Int8(weight).whole()
    assert ((whole - weight).abs() <= step * 0.5001).all()
    expected = torch.where(step > 0, (weight / step).round(), 0.0) * step
    torch.testing.assert_close(whole, expected)


def test_the_error_of_normal_weights_is_that_of_the_types():
    """Four bits by equal steps of each block's largest, the plain alternative, err more than NF4."""
    weight = normal(512, 512, scale=1.0)
    blocks = weight.view(-1, 64)
    steps = blocks.abs().amax(1, keepdim=True) / 7
    linear = ((blocks / steps).round() * steps - blocks).square().mean().sqrt()
    errors = {bits: (kind(weight).whole() - weight).square().mean().sqrt() for bits, kind in KINDS.items()}
    assert 0.090 < errors["nf4"] < 0.095
    assert errors["nf4"] < 0.95 * linear
    assert errors["int8"] < 0.01


@every_kind
@pytest.mark.parametrize("shape", [(48, 80), (7, 13), (1, 1), (4, 24, 48), (3, 5, 7), (300, 129)], ids=str)
def test_any_shape_comes_back_in_its_shape_and_type(bits, shape):
    for dtype in (torch.float32, torch.bfloat16):
        weight = normal(*shape).to(dtype)
        code = KINDS[bits](weight)
        assert code.whole().shape == weight.shape
        assert code.whole().dtype == dtype
        assert (code.whole() - weight).abs().max() < 0.2 * weight.abs().max()
        assert not any(parameter.requires_grad for parameter in code.parameters())


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("bits", "each"), [("int8", 8 + 32 / 1024), ("nf4", 4 + 8 / 64 + 32 / (64 * 256))])
def test_a_weight_takes_as_many_bits_as_stated(bits, each):
    code = KINDS[bits](normal(512, 1024))
    beside = 4 if bits == "nf4" else 0
    assert code.num_bytes - beside == 512 * 1024 * each / 8
    assert 8 * code.num_bytes / (512 * 1024) < each + 0.001


@every_kind
def test_no_whole_weight_lives_between_forward_and_backward(bits):
    def whole_ones():
        gc.collect()
        return sum(
            issubclass(type(item), torch.Tensor) and item.is_floating_point() and item.numel() == 96 * 80
            for item in gc.get_objects()
        )

    x = normal(4, 80).requires_grad_()
    code = KINDS[bits](normal(96, 80))
    before, kept = whole_ones(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = code(x).square().sum()
    assert whole_ones() == before
    assert all(size <= 4 * 96 for size in kept)
    plain = normal(96, 80).requires_grad_()
    assert whole_ones() == before + 1, "the count sees a whole weight"
    y.backward()
    del plain
    assert whole_ones() == before


# ---------------------------------------------------------------- products and gradients


@every_kind
def test_the_gradient_through_it_is_that_through_the_whole_weight(bits):
    code = KINDS[bits](normal(24, 40, scale=1.0))
    x = normal(3, 5, 40, scale=1.0).double().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y, expected = code(x), F.linear(twin, code.whole(torch.float64))
    assert torch.equal(y, expected)
    gradient = normal(3, 5, 24, seed=1).double()
    y.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(code, x.detach()[:1, :2].requires_grad_())


@every_kind
@pytest.mark.parametrize("width", [40, 42], ids=["fused", "one-by-one"])
def test_stacked_experts_multiply_and_learn_like_whole_ones(bits, width):
    code = KINDS[bits](normal(4, 24, width, scale=1.0))
    counts = torch.tensor([3, 0, 5, 1])
    x = normal(9, width, scale=1.0).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y, expected = code(x, counts), grouped(twin, code.whole(), counts)
    assert torch.equal(y, expected)
    gradient = normal(9, 24, seed=1)
    y.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-6, atol=1e-6)


@every_kind
def test_under_autocast_products_are_bfloat16_and_the_gradient_keeps_its_type(bits):
    code = KINDS[bits](normal(24, 40, scale=1.0))
    x = normal(5, 40, scale=1.0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = code(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, code.whole().sum(0).expand_as(x), rtol=0.02, atol=0.2)


# ---------------------------------------------------------------- models


@every_kind
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "mixture"])
def test_a_quantised_model_computes_and_learns_as_the_model_of_its_values(build, logits_of, bits, sparse):
    model = build(sparse=sparse)
    original = copy.deepcopy(model)
    adapt(model, LoraConfig(rank=4, quantize=bits), seed=0)
    whole = merged(model)
    twin = copy.deepcopy(whole)
    assert any(isinstance(module, Experts) for module in whole.modules()) == sparse
    adapt(twin, LoraConfig(rank=4), seed=0)
    for one in (model, twin):
        logits_of(one, TOKENS).square().mean().backward()
    gradients = [
        {n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (model, twin)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 3 * (6 if sparse else 7)
    for name, values in gradients[0].items():
        torch.testing.assert_close(values, gradients[1][name], rtol=1e-4, atol=1e-6)
    for name, parameter in whole.named_parameters():
        same = torch.equal(parameter, original.get_parameter(name))
        outside = any(word in name for word in ("embed", "norm", "lm_head", "mlp.gate."))
        assert same == outside, name


def test_a_model_s_blocks_take_an_eighth_of_their_memory(build):
    model = build(hidden_size=128, intermediate_size=256, num_layers=2)
    whole = sum(p.nbytes for n, p in model.named_parameters() if "_proj" in n)
    quantize(model, "nf4")
    codes = sum(module.num_bytes for module in model.modules() if isinstance(module, Quantized))
    assert not any("_proj" in name for name, _ in model.named_parameters())
    assert 4.12 / 32 < codes / whole < 4.16 / 32


@every_kind
def test_a_change_of_the_model_s_type_leaves_the_codes_alone(build, bits):
    model = build()
    quantize(model, bits)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.whole()
    model.bfloat16()
    assert torch.equal(layer.whole(), before)
    assert torch.equal(copy.deepcopy(layer).whole(), before)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "mixture"])
def test_recomputed_blocks_give_the_same_gradients(build, logits_of, mode, sparse):
    found = []
    for how in ("none", mode):
        model = build(sparse=sparse).train()
        adapt(model, LoraConfig(rank=4, quantize="nf4"), seed=0)
        with recomputed(model, how):
            logits_of(model, TOKENS).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


def test_an_unknown_kind_is_told_with_the_nearest(build):
    with pytest.raises(ConfigError, match="bits is 'nf3'; did you mean `nf4`"):
        quantize(build(), "nf3")
    assert set(KINDS) == set(quantized.Bits.__args__)
