"""The benchmark of mismatch: exactly so many tokens are compared, by what the loss of reinforcement learning says."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from benchmarks import engine_mismatch
from pensar.infer.native.exact import exact
from pensar.infer.native.library import available
from pensar.model.attention import Packed
from tiny import BENCHED


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_the_difference_is_that_of_a_plain_pass_and_of_an_exact_one_nothing(kind: str) -> None:
    if not available():
        pytest.skip("no compiler")
    model = engine_mismatch._model(BENCHED)
    samples = engine_mismatch._drawn(model, kind, 700)  # type: ignore[arg-type]
    assert len({len(sample) for sample in samples}) > 5
    largest, total, tokens = 0.0, 0.0, 0
    for sample in samples:
        ids = torch.from_numpy(sample.tokens).long()[None]
        with torch.no_grad():
            logits = model.logits(model(ids, torch.arange(ids.shape[1])[None], Packed()))[0].double()
        known = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
        assert sample.pg is not None
        assert sample.behaviour is not None
        gap = np.abs(known - sample.behaviour[1:])[sample.pg[1:] != 0]
        largest, total, tokens = max(largest, gap.max()), total + gap.sum(), tokens + len(gap)
    plain = engine_mismatch.compared(model, samples, nullcontext())
    assert plain.pg_weight == tokens == 700
    assert plain.mismatch_max == pytest.approx(largest, abs=1e-5)
    assert plain.mismatch == pytest.approx(total, abs=1e-2 if kind == "int8" else 1e-3)
    assert (plain.mismatch_max > 0.01) == (kind == "int8")
    alike = engine_mismatch.compared(model, samples, exact(model, kind))  # type: ignore[arg-type]
    assert alike.mismatch_max == alike.mismatch == alike.mismatch_kl == 0
    assert alike.pg_weight == 700


def test_a_step_of_the_tiny_recipe_learns_and_costs_something() -> None:
    step = engine_mismatch._step_of(engine_mismatch._model(BENCHED))
    drawing, learning = step(0)
    assert 0 < drawing < 20
    assert 0 < learning < 20
