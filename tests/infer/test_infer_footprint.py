"""What an engine says it takes is what its parts take."""

import pytest
import torch

from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.native.runner import NativeRunner
from pensar.infer.torch_runner import TorchRunner
from pensar.model.count import parameters
from tests.infer.native_work import MIXTURE, build


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
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = 256 * (2 * config.hidden_size + 2 * heads + 2 * keys) * 4
    gathered = (engine.pool.num_pages - 1) * 16 * (2 * keys * 4 + config.num_heads * 8)
    mlp = 256 * (3 * config.hidden_size + 3 * config.intermediate_size) * 4
    assert said.step == max(attention + gathered, mlp) + logits


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
