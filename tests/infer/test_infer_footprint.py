"""What an engine says it takes is what its parts take."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.native.runner import NativeRunner
from pensar.infer.torch_runner import TorchRunner
from pensar.model.count import parameters
from tests.infer.native_work import MIXTURE, batch_of, build, pages_for


@pytest.mark.parametrize("shape", [{}, MIXTURE], ids=["dense", "mixture"])
def test_weights_are_four_bytes_a_parameter_and_packed_ones_as_many_as_their_bits_ask_for(shape):
    model = build(**shape)
    own = 4 * parameters(model.config).total
    assert TorchRunner(model).weight_bytes() == own
    wide, narrow = (NativeRunner(model, kind).weight_bytes() - own for kind in ("float32", "int8"))
    assert 0.25 * wide < narrow < 0.6 * wide  # columns and groups are filled up where a tiny model has few
    assert wide >= own - model.config.num_layers * 4 * model.config.hidden_size


def test_what_torch_takes_is_weights_cache_and_activations():
    model = build()
    engine = Engine(TorchRunner(model), slots=2, max_tokens_per_slot=32, step_tokens=256)
    said, config = engine.footprint, model.config
    assert said.weights == 4 * parameters(config).total
    assert (
        said.cache
        == engine.pool.num_pages * 16 * config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
    )
    logits = 3 * 2 * config.vocab_size * 4
    texts = (engine.pool.num_pages - 1) * 16
    assert said.step == engine.runner.step_bytes(256, texts) + logits


def highest(runner, batch):
    """Bytes that a pass allocates beyond what it begins with, at their highest, from the profiler's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        runner.run(batch)
    found = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())])
    return int(held.max())


def pass_of(kind):
    """1,024 tokens of one prompt; 64 rows of one token behind texts of 500; the last 256 of a prompt of 4,096."""
    if kind == "decode":
        pages = [pages_for(500, 1 + 32 * row) for row in range(64)]
        return batch_of([([1], 499, own) for own in pages], range(64))
    done, num = (3_840, 256) if kind == "chunk" else (0, 1_024)
    return batch_of([([1] * num, done, pages_for(done + num))], [num - 1])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("prompt", {}), ("prompt", MIXTURE | {"moe_intermediate_size": 256}), ("decode", {}), ("chunk", {})],
    ids=["prompt", "experts", "decode", "chunk"],
)
def test_a_step_by_torch_takes_what_was_said(kind, shape):
    sizes = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "num_layers": 2}
    model = build(max_positions=8_192, **sizes, **({"intermediate_size": 768} | shape))
    runner, batch = TorchRunner(model), pass_of(kind)
    runner.reserve(int(batch.pages_RP.max()) + 1)
    logits = len(batch.wanted_S) * model.config.vocab_size * 4
    # A whole prompt needs no mask, which the plan cannot know: here it hides behind the MLP.
    said = runner.step_bytes(int(batch.starts[-1]), int(batch.lengths_R.sum()))
    assert said == pytest.approx(highest(runner, batch) - logits, rel=0.03)


def test_the_cache_grows_to_what_was_said_and_no_further():
    model = build()
    for runner in (TorchRunner(model), NativeRunner(model)):
        engine = Engine(runner, slots=2, max_tokens_per_slot=64)
        said = engine.footprint
        prompts = [torch.randint(1, 300, (56,)).tolist() for _ in range(6)]
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        engine.run([Request(str(n), prompt, params) for n, prompt in enumerate(prompts)])
        stores = [runner._store] if isinstance(runner, NativeRunner) else [*runner.keys, *runner.values]
        assert sum(store.nbytes for store in stores) == said.cache
        assert said.total == said.weights + said.cache + said.step
        assert f"cache up to {said.cache / 2**20:,.0f}" in str(said)


def test_a_step_takes_more_for_more_tokens_and_for_longer_texts_where_they_are_gathered():
    model = build()
    assert TorchRunner(model).step_bytes(64, 0) < TorchRunner(model).step_bytes(64, 100_000)
    assert NativeRunner(model).step_bytes(64, 0) == NativeRunner(model).step_bytes(64, 100_000)
    assert NativeRunner(model).step_bytes(64, 0) < NativeRunner(model).step_bytes(128, 0)
