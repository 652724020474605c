"""Counts by formula against the module itself and against the published figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pensar.base.errors import ConfigError
from pensar.model.count import flops_per_token, forward_flops_per_token, kv_bytes_per_token, parameters
from pensar.model.qwen3 import Qwen3
from pensar.model.sizes import INTERPOLATED, SIZES, size

# total, non-embedding, active, training GFLOP per token at 4,096 and at 32,768, cache bytes in bfloat16
OFFICIAL = {
    "0.6b": (596_049_920, 440_467_456, 596_049_920, 4.99, 14.85, 114_688),
    "1.7b": (1_720_574_976, 1_409_410_048, 1_720_574_976, 11.73, 21.60, 114_688),
    "4b": (4_022_468_096, 3_633_511_936, 4_022_468_096, 27.76, 53.13, 147_456),
    "8b": (8_190_735_360, 6_946_075_648, 8_190_735_360, 49.03, 74.40, 147_456),
    "14b": (14_768_307_200, 13_212_482_560, 14_768_307_200, 88.98, 124.2, 163_840),
    "32b": (32_762_123_264, 31_206_298_624, 32_762_123_264, 204.8, 295.0, 262_144),
    "30b-a3b": (30_532_122_624, 29_909_792_768, 3_353_032_704, 23.08, 56.91, 98_304),
    "235b-a22b": (235_093_634_560, 233_848_974_848, 22_190_763_520, 148.3, 280.8, 192_512),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_counts_of_official_sizes_are_the_published_ones(name):
    total, non_embedding, active, gflop_4k, gflop_32k, cache = OFFICIAL[name]
    counted = parameters(SIZES[name])
    assert (counted.total, counted.non_embedding, counted.active) == (total, non_embedding, active)
    assert flops_per_token(SIZES[name], 4_096) / 1e9 == pytest.approx(gflop_4k, rel=1e-3)
    assert flops_per_token(SIZES[name], 32_768) / 1e9 == pytest.approx(gflop_32k, rel=1e-3)
    assert kv_bytes_per_token(SIZES[name]) == cache


@pytest.mark.parametrize("name", SIZES)
def test_formula_equals_the_tensors_of_the_module(name):
    config = SIZES[name]
    with torch.device("meta"):
        model = Qwen3(config)
    tensors = dict(model.named_parameters())
    embedding = {"model.embed_tokens.weight", "lm_head.weight"}
    share = config.experts_per_token / config.num_experts if config.num_experts else 1.0
    unused = sum(round(t.numel() * (1 - share)) for key, t in tensors.items() if ".experts." in key)
    total = sum(tensor.numel() for tensor in tensors.values())
    body = sum(tensor.numel() for key, tensor in tensors.items() if key not in embedding)
    assert parameters(config) == (total, body, total - unused, body - unused)


def test_active_non_embedding_parameters_are_the_published_ones():
    assert parameters(SIZES["30b-a3b"]).active_non_embedding == 2_730_702_848
    assert parameters(SIZES["235b-a22b"]).active_non_embedding == 20_946_103_808


def test_interpolated_sizes_lie_between_their_neighbours():
    order = [name for name in SIZES if not name.startswith("tiny") and "-a" not in name]
    totals = [parameters(SIZES[name]).total for name in order]
    assert totals == sorted(totals)
    assert set(SIZES) - set(OFFICIAL) == INTERPOLATED | {"tiny", "tiny-moe", "tiny-student"}
    for name in INTERPOLATED:
        assert parameters(SIZES[name]).total / 1e9 == pytest.approx(float(name[:-1]), rel=0.03)


def test_a_forward_pass_costs_what_the_profiler_of_torch_counts(build):
    model = build(sparse=False, tied=True)
    tokens = torch.zeros(1, 32, dtype=torch.long)
    positions = torch.arange(32)[None]

    def attend(layer, q, k, v):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in (k, v))
        return ((q.transpose(1, 2) @ k.mT).softmax(-1) @ v).transpose(1, 2)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tokens, positions, attend))
    # The naive attention above computes the whole square: twice the causal half.
    assert counter.get_total_flops() == 32 * forward_flops_per_token(model.config, 64)


def test_an_unknown_size_names_the_nearest():
    assert size("tiny", vocab_size=512).vocab_size == 512
    with pytest.raises(ConfigError, match=r"0\.6B.*did you mean `0\.6b`"):
        size("0.6B")
