"""Steps of training are transformers' to the last digits of float64: nothing but rounding is between the two."""

import pytest

from benchmarks.pretrain_parity import PARITY, PARITY_SPARSE, apart, losses_in_float64
from pensar.model import qwen3
from pensar.model.config import ModelConfig, replace

STEPS = 8


@pytest.mark.parametrize("config", [PARITY, PARITY_SPARSE], ids=["dense", "sparse"])
def test_losses_in_float64_are_those_of_transformers(config: ModelConfig) -> None:
    """With the attention in blocks, the chunked head and, where sparse, the experts as in float32."""
    pytest.importorskip("transformers")
    ours, theirs = losses_in_float64(replace(config, num_layers=1), STEPS)
    assert ours[-1] < ours[0] - 0.5
    assert apart(ours, theirs) < 1e-12


def test_a_slip_far_below_the_rounding_of_float32_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    normalise = qwen3.RMSNorm.forward
    monkeypatch.setattr(qwen3.RMSNorm, "forward", lambda norm, x: normalise(norm, x) * (1 + 1e-9))
    assert apart(*losses_in_float64(replace(PARITY_SPARSE, num_layers=1), STEPS)) > 1e-11
