"""Simulated steps against real ones on real ranks, hand arithmetic, and the planner's formulas."""

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recorded_work import recorded

from pensar.base.errors import RunError
from pensar.base.ranks import Crew, World
from pensar.cli import main
from pensar.model.config import ModelConfig, replace
from pensar.model.sizes import size
from pensar.train.accelerators import accelerator
from pensar.train.comparison import compare
from pensar.train.fakes import Balanced, fake_mode
from pensar.train.footprint import Step, share
from pensar.train.layout import Layout, parse_layout
from pensar.train.recorder import Exchange, Recorder
from pensar.train.simulate import DEPTHS, Moments, folded, simulate

TINY = ModelConfig(
    vocab_size=2048, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=384,
    tied=True,
)  # fmt: skip
MODELS = {
    "dense": TINY,
    "untied": replace(TINY, tied=False),
    "experts": replace(
        TINY, intermediate_size=0, num_experts=8, experts_per_token=2, moe_intermediate_size=128, tied=False
    ),
}
STEP = Step(context=256, rows=2, chunk_tokens=128, compute_bytes=4, on_cpu=True)


def totals(moments: Moments) -> dict[str, float]:
    return {name: sum(parts.values()) for name, parts in moments.items()}


def by_kind(exchanges: list[Exchange]) -> dict[tuple[str, str, int], tuple[float, float]]:
    return {one[:3]: (one.calls, one.num_bytes) for one in exchanges}


@pytest.mark.parametrize(
    ("name", "text", "rest"),
    [
        ("dense", "", {"muon": True}),
        ("dense", "recompute=selective", {"accumulate": 2}),
        ("experts", "recompute=full", {}),
    ],
)
def test_a_simulated_step_holds_to_the_byte_what_a_real_one_does(
    name: str, text: str, rest: dict[str, Any]
) -> None:
    model, layout, step = MODELS[name], parse_layout(text), replace(STEP, **rest)
    real, _ = recorded(World(), model, layout, step)
    assert totals(simulate(model, layout, step).moments) == totals(folded(real))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dense", "shard=2"),
        ("untied", "shard=2,recompute=full"),
        ("dense", "replicate=2"),
        ("dense", "cp=2"),
        ("untied", "pp=2,micro_batches=2"),
    ],
)
def test_simulated_ranks_hold_and_send_to_the_byte_what_real_ones_do(
    pair: Crew, name: str, text: str
) -> None:
    model, layout = MODELS[name], parse_layout(text)
    found = simulate(model, layout, STEP)
    for _ in range(4):
        real, sent = pair.call(recorded, model, layout, STEP)
        # The thread that exchanges lets go of a buffer now and then only after the operation that follows.
        if totals(found.moments) == totals(folded(real)):
            break
    assert totals(found.moments) == totals(folded(real))
    assert by_kind(found.exchanges) == by_kind(sent)
    assert sum(one.num_bytes for one in sent) > 0


@pytest.mark.parametrize("text", ["shard=2,ep=2", "cp=2,ep=2,recompute=full", "tp=2,ep=2"])
def test_simulated_experts_differ_from_real_ones_by_their_uneven_load_alone(pair: Crew, text: str) -> None:
    """Random routers give rank 0 some percent more than half of the tokens."""
    model, layout = MODELS["experts"], parse_layout(text)
    real, sent = pair.call(recorded, model, layout, STEP)
    found = simulate(model, layout, STEP)
    assert totals(found.moments) == pytest.approx(totals(folded(real)), rel=0.1)
    assert found.exchanges
    simulated = by_kind(found.exchanges)
    for key, (calls, moved) in by_kind(sent).items():
        assert simulated[key] == (calls, pytest.approx(moved, rel=0.1 if key[0] == "all-to-all" else 0))


def test_heads_that_are_split_hold_nearly_what_real_ones_do_and_send_the_same(pair: Crew) -> None:
    layout = parse_layout("tp=2")
    real, sent = pair.call(recorded, TINY, layout, STEP)
    found = simulate(TINY, layout, STEP)
    assert totals(found.moments) == pytest.approx(totals(folded(real)), rel=0.04)
    assert by_kind(found.exchanges) == by_kind(sent)


def test_the_collectives_of_a_thousand_ranks_are_those_of_hand_arithmetic() -> None:
    """64 experts over 1,024 ranks in 16 groups of 64; all sizes divide, so that nothing is padded but the norms."""
    D, I, E, k, V, t, L = 2048, 256, 64, 4, 4096, 128, 3
    model = ModelConfig(
        vocab_size=V, hidden_size=D, num_layers=L, num_heads=16, num_kv_heads=8, head_dim=128, intermediate_size=0,
        num_experts=E, experts_per_token=k, moe_intermediate_size=I, tied=False,
    )  # fmt: skip
    layout = Layout(dp_shard=1024, ep=64)
    found = simulate(model, layout, Step(context=t, on_cpu=True))
    sent = by_kind(found.exchanges)
    assert found.depths == (L,)
    expert = 3 * D * I
    assert sent["all-gather", "expert shard", 16] == (2 * L, 2 * 2 * L * expert)
    assert sent["reduce-scatter", "expert shard", 16] == (L, 4 * L * expert)
    # To the experts and back, forward and backward, and whole numbers that say how many rows each rank sends.
    assert sent["all-to-all", "ep", 64] == (5 * L, L * (4 * 2 * t * k * D + 8 * E))
    head_norms, router = (
        2 * 1024,
        1024 * D,
    )  # each is cut into a row for each rank, 128 and 64 rows into 1,024
    block = D * 128 * (2 * 16 + 2 * 8) + 2 * D + head_norms + router
    ends = 2 * V * D + D
    assert sent["all-gather", "shard", 1024] == (2 * L + 1, 2 * (2 * L * block + ends))
    assert sent["reduce-scatter", "shard", 1024] == (L + 1, 4 * (L * block + ends))
    # Weights and both moments of AdamW, by slices of two experts' width where ranks have fewer experts than shards.
    own = (L * (D * 128 * 48 + 2 * D + router) + ends) / 1024 + L * expert / 16
    weights = found.moments["update"]["weights"]
    assert weights == pytest.approx(4 * own, rel=1e-3)
    assert found.moments["update"]["optimizer"] == pytest.approx(2 * weights, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_deep_model_lies_on_the_line_through_shallow_ones(
    recompute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layout = replace(MODELS["experts"], num_layers=12), Layout(dp_shard=64, ep=4, recompute=recompute)
    drawn = simulate(model, layout, STEP)
    assert drawn.depths == DEPTHS
    assert drawn.bend < 1e-4
    monkeypatch.setattr("pensar.train.simulate.DEPTHS", (4, 5, 12))
    run = simulate(model, layout, STEP)
    assert run.depths == (12,)
    assert totals(drawn.moments) == pytest.approx(totals(run.moments), rel=1e-3)
    assert by_kind(drawn.exchanges) == by_kind(run.exchanges)


@pytest.mark.parametrize(
    ("name", "text", "rest"),
    [
        ("dense", "shard=8", {}),
        ("untied", "shard=4,tp=2", {}),
        ("dense", "shard=4,cp=4", {"context": 2048}),
        ("experts", "shard=64,ep=8,recompute=full", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("dense", "shard=64,recompute=full", {"accumulate": 2}),
                ("dense", "shard=2", {"muon": True}),  # as many matrices for each
                ("untied", "replicate=2,shard=16,recompute=selective", {}),
                ("untied", "shard=2,tp=2,recompute=full", {"rows": 4}),
                ("untied", "shard=4,pp=2,micro_batches=4", {}),
                ("experts", "shard=16,ep=8", {"accumulate": 2}),
                ("experts", "shard=8,tp=2,ep=8,recompute=full", {}),
                ("experts", "shard=4,cp=2,ep=4,recompute=full", {}),
                ("experts", "shard=8,pp=2,micro_batches=4,ep=4,recompute=full", {}),
            )
        ),
    ],
)
def test_the_formulas_are_within_a_tenth_of_what_simulations_find(
    name: str, text: str, rest: dict[str, Any]
) -> None:
    """Wide enough for padding to be little: a hidden size of 1,024 and rows of 1,024 tokens in bfloat16."""
    model = replace(
        MODELS[name],
        hidden_size=1024,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=8192,
        num_layers=6,
    )
    model = (
        replace(model, moe_intermediate_size=512)
        if model.num_experts
        else replace(model, intermediate_size=3072)
    )
    layout, step = parse_layout(text), Step(**{"context": 1024, "chunk_tokens": 1024} | rest)
    for stage in sorted({0, layout.pp - 1}):
        found = compare(model, layout, step, accelerator("h100"), stage)
        assert found.peak.difference == pytest.approx(0, abs=0.1), found.moments
        for row in found.exchanges:
            if row.predicted:
                assert row.difference == pytest.approx(0, abs=0.1), row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "context"),
    [
        ("shard=1024,ep=64,recompute=full", 4096),
        ("shard=1024,ep=64", 4096),
        ("shard=128,cp=8,ep=64,recompute=full", 32_768),
        ("shard=256,tp=4,ep=64,recompute=full", 4096),
        ("replicate=2,shard=64,cp=2,ep=8,pp=4,micro_batches=8,recompute=full", 4096),
    ],
)
def test_the_plan_of_235b_on_1024_ranks_is_what_its_own_code_does(text: str, context: int) -> None:
    layout = parse_layout(text)
    for stage in sorted({0, layout.pp - 1}):
        found = compare(size("235b-a22b"), layout, Step(context=context), accelerator("h200"), stage)
        assert found.simulated.bend < 0.01
        assert found.peak.difference == pytest.approx(0, abs=0.1), found.moments
        for row in found.exchanges:
            if row.predicted:
                assert row.difference == pytest.approx(0, abs=0.1), row


def test_a_part_of_the_depth_is_simulated_as_the_rank_that_has_it() -> None:
    model, layout = replace(MODELS["untied"], num_layers=6), Layout(dp_shard=2, pp=3, micro_batches=3)
    first, middle, last = (simulate(model, layout, STEP, stage) for stage in range(3))
    for stage, found in enumerate((first, middle, last)):
        part = share(model, layout, stage)
        held = found.moments["update"]["weights"]
        assert held == pytest.approx(4 * (part.layers * part.block + part.ends) / 2, rel=1e-3)
    sent = [by_kind(found.exchanges) for found in (first, middle, last)]
    row = 2 * 256 * 128 * 4
    assert sent[0]["send", "pp", 3] == (3, 3 * row)
    assert sent[1]["send", "pp", 3] == sent[1]["receive", "pp", 3] == (6, 6 * row)
    assert sent[2]["receive", "pp", 3] == (3, 3 * row)


def test_programs_may_decide_by_what_is_real_and_ask_after_what_is_not() -> None:
    with fake_mode(), Balanced():
        x = torch.randn(6, 4)
        real = torch.tensor([True, False, True, True, False, True])
        assert x[real].shape == (4, 4)
        assert bool((x > 0).any()) is True
        assert float(x.sum()) == 1.0
        assert torch.bincount((x > 0).long().flatten(), minlength=5).tolist() == [5, 5, 5, 5, 4]
        assert torch.arange(3).tolist() == [0, 1, 2]


def test_a_recorder_knows_what_is_alive_and_when_it_was_most() -> None:
    with Recorder() as recorder:
        kept = torch.zeros(1000)
        recorder.claim([kept], "weights")
        recorder.begin()
        recorder.moment = "first"
        passing = torch.zeros(500)
        del passing
        recorder.moment = "second"
        view = torch.zeros(100).view(10, 10)
    found = recorder.peaks()
    assert found["first"] == {"weights": 4000, "activations": 2000}
    assert found["second"] == {"weights": 4000, "activations": 400}
    assert view.numel() == 100


def test_a_process_that_is_a_rank_does_not_pretend_to_be_another() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), world_size=2, rank=0)
    try:
        with pytest.raises(RunError, match="use a process of its own"):
            simulate(TINY, Layout(dp_shard=2), STEP)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_plan_shows_what_a_simulation_finds(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan 0.6b --gpus 16 --gpu h100 --tokens 1e10 --simulate --layout shard=16,recompute=full".split()
    assert main([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["simulation"]
    assert found["layout"]["dp_shard"] == 16
    assert abs(found["peak_bytes"]["difference"]) < 0.1
    assert {row["name"] for row in found["exchanges"]} >= {
        "all-gather of weights",
        "reduce-scatter of gradients",
    }
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "predicted" in text
    assert "4, 5, 7 layers run" in text
    assert main([*words[:-2], "--layout", "shard=8"]) == 2
    assert "the plan is for --gpus 16" in capsys.readouterr().err
