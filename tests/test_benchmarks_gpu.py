"""What the GPU benchmark checks and measures, on a processor and tiny shapes: it runs, and finds what is wrong."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_checks, pretrain_gpu
from benchmarks.gpu_training import Case, batches_of, peer_training, training
from pensar.model.attention import Packed
from pensar.model.config import ModelConfig, replace

CPU = torch.device("cpu")


@pytest.fixture
def shape() -> ModelConfig:
    small = gpu_checks.small(vocab_size=96)
    return replace(
        small, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96
    )


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["pretrain_gpu"])
    assert pretrain_gpu.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found["ratio"] is None
    assert "no CUDA device" in found["reason"]
    assert list(found)[:9] == [
        "metric",
        "ours",
        "peer",
        "peer_name",
        "unit",
        "ratio",
        "limit",
        "percent_of_limit",
        "machine",
    ]


def test_a_line_has_its_ratio() -> None:
    line = pretrain_gpu.line_of(
        "x", 3.0, 2.0, limit=12.345678, percent=33.333, target=1.25, reached=True, reason=None
    )
    assert (line["ratio"], line["limit"], line["percent_of_limit"]) == (1.5, 12.346, 33.3)
    assert (line["target"], line["reached"]) == (1.25, True)
    assert "reason" not in line


def test_every_way_of_attention_agrees_with_all_pairs() -> None:
    found = gpu_checks.attention(CPU, num_tokens=64, heads=4, size=16)
    assert {finding.name for finding in found} == {
        f"attention_{name}"
        for name in (
            "packed_bfloat16",
            "packed_float32",
            "whole_rows_bfloat16",
            "whole_rows_float32",
            "dense_mask_bfloat16",
        )
    }
    assert all(0 < finding.error <= finding.allowed for finding in found)


def test_attention_that_looks_past_its_document_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "_attend", lambda segments: lambda q, k, v: Packed()(0, q, k, v))
    found = gpu_checks.attention(CPU, num_tokens=64, heads=4, size=16)
    wrong = {finding.name for finding in found if finding.error > finding.allowed}
    assert wrong == {"attention_packed_bfloat16", "attention_packed_float32"}


def test_logits_and_experts_agree_with_float64(shape: ModelConfig) -> None:
    found = [*gpu_checks.logits(CPU, shape, num_tokens=64), *gpu_checks.experts(CPU, 256, 32, 16)]
    assert [finding.name for finding in found] == [
        "logits_float32",
        "logits_bfloat16",
        "grouped_experts_bfloat16",
    ]
    assert all(0 < finding.error <= finding.allowed for finding in found)


def test_experts_whose_rows_are_shifted_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gpu_checks.grouped

    def shifted(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
        return plain(x, w, counts.roll(1))

    monkeypatch.setattr(gpu_checks, "grouped", shifted)
    (found,) = gpu_checks.experts(CPU, 256, 32, 16)
    assert found.error > found.allowed


@pytest.mark.slow
def test_float8_follows_on_text_that_can_be_learnt(shape: ModelConfig) -> None:
    (found,) = gpu_checks.float8_follows(shape, steps=30, plain="float32")
    assert 0 < found.error <= found.allowed


def test_positions_begin_anew_with_each_document() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
    assert gpu_checks._positions(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]


def test_batches_are_documents_of_equal_length(shape: ModelConfig) -> None:
    case = Case(config=shape, context=32, rows=2, documents=4)
    (batch,) = batches_of(case, 1, learnable=True)
    assert batch.segments[0].tolist() == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8
    assert batch.positions[1].tolist() == list(range(8)) * 4
    assert batch.ce is not None
    assert batch.ce.sum() == 2 * 4 * 7
    assert int(batch.tokens.max()) < shape.vocab_size


def test_ours_and_the_peer_take_steps_on_the_same_batches(shape: ModelConfig) -> None:
    """Both begin near the loss of a uniform guess."""
    case = Case(config=shape, context=32, rows=2)
    batches = batches_of(case, 2)
    with training(case, batches) as ours, peer_training(case, batches, CPU) as theirs:
        losses = [step()["loss"] for step in (ours, theirs, ours, theirs)]
    assert losses == pytest.approx([4.56] * 4, abs=0.3)  # log 96


def test_experts_of_the_peer_are_ours(shape: ModelConfig) -> None:
    sparse = replace(shape, num_experts=4, experts_per_token=2, moe_intermediate_size=32, intermediate_size=0)
    case = Case(config=sparse, context=32, rows=2)
    batches = batches_of(case, 1)
    with training(case, batches) as ours, peer_training(case, batches, CPU) as theirs:
        assert [ours()["loss"], theirs()["loss"]] == pytest.approx([4.56] * 2, abs=0.3)
