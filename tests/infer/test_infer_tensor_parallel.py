"""Tensor parallel: the replies of one rank by two and four, each with its part of the weights and of the cache."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensor_parallel_work as work
import torch

from pensar.base.errors import ConfigError, RunError
from pensar.base.ranks import Crew, World
from pensar.infer.engine import Engine
from pensar.infer.split import Shares, possible_sizes
from pensar.infer.step import PAGE
from pensar.infer.tensor_parallel import on_ranks
from pensar.infer.torch_runner import TorchRunner
from pensar.model.attention import Packed
from pensar.model.config import replace
from pensar.model.qwen3 import Qwen3
from pensar.model.sizes import SIZES
from pensar.model.weights import save_model
from tiny import SPARSE, tiny_model

ODD = {"vocab_size": 301, "intermediate_size": 50}
"""Not divisible by the ranks."""
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"tied": False, **ODD},
    "tied": {"tied": True, **ODD},
    "sparse": {**SPARSE, "tied": False, "vocab_size": 301},
    "sparse, tied, experts that do not go round": {**SPARSE, "num_experts": 6, "tied": True},
}


@pytest.fixture(scope="module")
def pair() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


@pytest.fixture(scope="module")
def four() -> Iterator[Crew]:
    with Crew(4) as crew:
        yield crew


def logits_of(model: Qwen3, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.tensor([prompt]), torch.arange(len(prompt))[None], Packed())[0])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together_reply_as_one_does(request: pytest.FixtureRequest, name: str, size: int) -> None:
    crew = request.getfixturevalue("pair" if size == 2 else "four")
    model = tiny_model(**SHAPES[name]).eval()
    one = TorchRunner(model)
    greedy, drawn, logits_SV, heads, page_bytes, weight_bytes = crew.call(work.served, SHAPES[name], {})
    assert greedy == work.texts(Engine(one))
    assert drawn == work.texts(Engine(one), temperature=1.0, seed=3)
    assert logits_SV.shape[1] == model.config.vocab_size
    assert float((logits_SV - logits_of(model, work.PROMPTS[0])).abs().max()) < 1e-5
    # Of two key-value heads each of two ranks has one; of four, two have the same.
    assert heads == {1}
    assert page_bytes == one.page_bytes() * max(1, size // 2)
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert whole <= weight_bytes < 1.5 * whole


def test_a_tight_cache_small_steps_and_preemption_change_nothing(pair: Crew) -> None:
    options = {"slots": 3, "cache_tokens": 6 * PAGE, "step_tokens": 7}
    greedy, *_ = pair.call(work.served, SHAPES["dense"], options)
    assert greedy == work.texts(Engine(TorchRunner(tiny_model(**SHAPES["dense"]).eval())))


@pytest.mark.parametrize("name", ["dense", "sparse, tied, experts that do not go round"])
def test_every_rank_reads_only_its_part_of_a_directory(pair: Crew, tmp_path: Path, name: str) -> None:
    model = tiny_model(**SHAPES[name]).eval()
    save_model(model, tmp_path / "model")
    parts = pair.call(work.held, tmp_path / "model")
    whole = sum(parameter.numel() for parameter in model.parameters())
    shared = sum(
        parameter.numel()
        for own, parameter in model.named_parameters()
        if own.endswith(("norm.weight", "mlp.gate.weight"))
    )
    assert sum(count for count, _ in parts) == whole + shared
    assert max(count for count, _ in parts) < 0.52 * whole + shared
    assert [same for _, same in parts] == [True, True], "all ranks see one stream, so their routers agree"
    greedy, *_ = pair.call(work.served, tmp_path / "model", {})
    assert greedy == work.texts(Engine(TorchRunner(model)))


def test_new_weights_reach_every_rank_and_wrong_ones_none(four: Crew) -> None:
    shape = SHAPES["sparse"]
    before, after, version, said, again = four.call(work.reloaded, shape)
    assert before == work.texts(Engine(TorchRunner(tiny_model(**shape).eval())))
    assert after == again == work.texts(Engine(TorchRunner(tiny_model(seed=1, **shape).eval())))
    assert after != before
    assert version == 1
    wrong_shape, wrong_names, adapter, alone = said
    assert "ModelError" in wrong_shape
    assert "an engine keeps one shape" in wrong_shape
    assert "differ from the model in" in wrong_names
    assert "tensor parallel takes no adapters" in adapter
    assert "a part of a model was asked to compute alone" in alone


@pytest.mark.slow
def test_pages_of_all_ranks_go_to_the_spill_and_come_back(four: Crew) -> None:
    found, restored, preempted = four.call(work.spilled, SHAPES["tied"])
    expected = work.texts(Engine(TorchRunner(tiny_model(**SHAPES["tied"]).eval())))
    assert found == [expected] * 3
    assert restored > 0
    assert preempted > 0


@pytest.mark.parametrize(
    ("kind", "number", "says"),
    [
        pytest.param("killed", 1, "rank 1 .* ended by signal 9", marks=pytest.mark.slow),
        ("killed", 7, "rank 1 .* ended by signal 9"),
        pytest.param("raises", 3, "this rank has a fault", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_ends_the_engine_at_once(kind: str, number: int, says: str) -> None:
    with Crew(2) as crew:
        crew.call(work.served, SHAPES["dense"], {})
        start = time.monotonic()
        with pytest.raises((RunError, ValueError), match=says) as caught:
            crew.call(work.dies, number, kind)
        assert time.monotonic() - start < 20
        assert "a step on 2 ranks failed on rank 0" in str(caught.value.__cause__)
        assert crew.call(work.served, SHAPES["dense"], {}) is not None, "a crew starts anew"


def test_a_fault_of_the_first_rank_is_final_and_lets_the_others_go() -> None:
    """They wait for its part of a sum and would wait for ever."""
    with Crew(2) as crew, pytest.raises(RunError, match=r"have ended \(no room\); start it again"):
        crew.call(work.fails_alone)


def test_one_rank_alone_is_an_engine_too() -> None:
    model = tiny_model(**SHAPES["dense"]).eval()
    found = on_ranks(World(), model, lambda runner: work.texts(Engine(runner)))
    assert found == work.texts(Engine(TorchRunner(model)))


def test_numbers_of_ranks_that_cannot_share_a_model_are_refused() -> None:
    config = tiny_model().config
    with pytest.raises(ConfigError, match=r"3 ranks cannot share this model: .*; possible: 1, 2, 4$"):
        Shares(config, 0, 3)
    assert possible_sizes(replace(config, num_heads=24, num_kv_heads=4)) == [1, 2, 4, 8, 12, 24]
    assert possible_sizes(replace(config, num_heads=12, num_kv_heads=6)) == [1, 2, 3, 6, 12]
    assert possible_sizes(tiny_model(**SPARSE | {"num_experts": 3}).config) == [1, 2]
    assert 8 in possible_sizes(SIZES["235b-a22b"])


def test_parts_lie_side_by_side_and_query_heads_are_with_their_keys() -> None:
    """By hand: 24 query heads in 4 groups of 6; of 8 ranks two have one key-value head and three heads of its six."""
    config = replace(tiny_model().config, num_heads=24, num_kv_heads=4, vocab_size=301)
    for size in (2, 8):
        shares = [Shares(config, rank, size) for rank in range(size)]
        for kind in ("heads", "columns", "vocabulary"):
            spans = [getattr(share, kind) for share in shares]
            assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
        for share in shares:
            groups = {head // 6 for head in range(share.heads.start, share.heads.stop)}
            assert groups == set(range(share.kv_heads.start, share.kv_heads.stop))
    assert Shares(config, 3, 8).window("model.layers.1.self_attn.k_proj.weight") == (
        slice(8, 16),
        slice(0, 32),
    )
    assert Shares(config, 3, 8).window("model.layers.1.self_attn.o_proj.weight") == (
        slice(0, 32),
        slice(72, 96),
    )
    assert Shares(config, 3, 8).window("model.norm.weight") == (slice(0, 32),)
