"""The pieces of the pre-training benchmark: what is timed, read and compared is what its lines say."""

import json
import statistics
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    pretrain,
    pretrain_balance,
    pretrain_learning,
    pretrain_loading,
    pretrain_parity,
    pretrain_steps,
)
from pensar.model.config import ModelConfig, replace
from pensar.model.weights import load_model, save_model

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=48,
    tied=True,
)
SPARSE = replace(SMALL, num_experts=4, experts_per_token=2, moe_intermediate_size=16)


@pytest.mark.parametrize(("config", "experts"), [(SMALL, ""), (SPARSE, "eager"), (SPARSE, "grouped_mm")])
def test_both_sides_take_the_same_first_steps(config: ModelConfig, experts: str) -> None:
    tokens_of = pretrain_steps.random_tokens(config, rows=2, context=24)
    config = replace(config, router_balance_weight=0.0)
    more = {"experts_implementation": experts} if experts else {}
    theirs = pretrain_steps.peer_step(pretrain_steps.peer_model(config, **more), tokens_of, compiling=False)
    with ExitStack() as stack:
        ours = pretrain_steps.our_step(pretrain_steps.started(config), tokens_of, stack, compiling=False)
        for _ in range(3):
            assert ours() == pytest.approx(theirs(), abs=1e-5)


def test_rounds_are_taken_in_turns_and_the_first_do_not_count() -> None:
    taken: list[str] = []

    def run(name: str, seconds: float) -> float:
        taken.append(name)
        return seconds * len(taken)

    contenders = {"ours": partial(run, "ours", 1.0), "peer": partial(run, "peer", 1.0)}
    found = pretrain_steps.interleaved(contenders, rounds=2, warm=1)
    assert taken == ["ours", "peer"] * 3
    assert found == {"ours": [3.0, 5.0], "peer": [4.0, 6.0]}
    expected = statistics.median([4 / 3, 6 / 5])
    assert pretrain_steps.paired(found["ours"], found["peer"]) == pytest.approx(expected)


def small_step(stack: ExitStack) -> pretrain_steps.Step:
    tokens_of = pretrain_steps.random_tokens(SMALL, rows=2, context=24)
    return pretrain_steps.our_step(pretrain_steps.started(SMALL), tokens_of, stack, compiling=False)


@pytest.mark.slow
def test_a_contender_apart_answers_with_its_own_seconds() -> None:
    with pretrain_steps.apart(small_step) as seconds:
        assert 0.0 < seconds() < 60.0
        assert 0.0 < seconds() < 60.0


@pytest.mark.parametrize(
    ("ratio", "ours", "sign", "reached"),
    [(1.2, 5.0, 1, True), (1.1, 5.0, 1, False), (None, 1.1, -1, True), (None, 1.2, -1, False)],
)
def test_a_target_is_for_the_ratio_where_there_is_one(
    ratio: float | None, ours: float, sign: int, reached: bool
) -> None:
    line = pretrain_steps.line("m", ours, None, "p", "u", ratio=ratio, target=1.15, sign=sign, limit=10.0)
    assert line["reached"] is reached
    assert line["percent_of_limit"] == pytest.approx(ours * 10)
    assert {"metric", "ours", "peer", "peer_name", "unit", "ratio", "limit", "machine"} <= set(line)


def test_operations_of_the_yardstick_are_those_of_its_products() -> None:
    run, operations = pretrain_steps.products(64)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == operations


def test_shards_and_the_single_file_hold_the_same_model(tmp_path: Path) -> None:
    model = pretrain_loading.random_model(SMALL)
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    save_model(model, single)
    pretrain_loading.shard(single, sharded)
    assert len(pretrain_loading.files_of(sharded)) == pretrain_loading.SHARDS
    for ours, theirs in zip(load_model(sharded).parameters(), load_model(single).parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)
    size = sum(path.stat().st_size for path in pretrain_loading.files_of(sharded))
    buffer = torch.zeros(size, dtype=torch.uint8)
    assert pretrain_loading.read(sharded, buffer) == size
    whole = b"".join(path.read_bytes() for path in pretrain_loading.files_of(sharded))
    assert buffer.numpy().tobytes() == whole


def test_windows_are_of_the_text_to_learn_from_and_none_is_held_out() -> None:
    kept, held_out = pretrain_learning.text()
    assert min(len(kept), len(held_out)) > 100_000
    tokens = pretrain_learning.text_tokens(2, 64)(5)
    assert tokens.shape == (2, 64)
    assert all(row.astype(np.uint8).tobytes() in kept.tobytes() for row in tokens)
    assert not any(row.astype(np.uint8).tobytes() in held_out.tobytes() for row in tokens)


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte() -> None:
    model = pretrain_steps.started(pretrain_learning.TEXT)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert pretrain_learning.bits_per_byte(model, windows=4) == pytest.approx(8.0, abs=1e-4)


def test_losses_and_logits_are_the_peers() -> None:
    ours, theirs = pretrain_parity.losses(SPARSE_TEXT, steps=4, compiling=False)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0]
    apart, largest = pretrain_parity.logits_apart(SMALL)
    assert apart < 1e-6 < largest


SPARSE_TEXT = replace(SPARSE, vocab_size=256, router_balance_weight=0.0)


def test_the_same_experts_are_taken_and_what_would_have_differed_is_counted() -> None:
    """Followed by itself a run differs in nothing; by a run from other weights nearly every token is sent elsewhere."""
    choices = pretrain_parity.Choices()
    steps = 3
    theirs = pretrain_parity.peer_losses(SPARSE_TEXT, steps, within=choices.kept)
    assert len(choices.chosen) == steps * SPARSE_TEXT.num_layers
    for run in (pretrain_parity.peer_losses, pretrain_parity.our_losses):
        same = choices.followed()
        assert run(SPARSE_TEXT, steps, within=same.within) == pytest.approx(theirs, abs=1e-5)
        same.end()
        assert same.differing == 0
        assert same.gap < 1e-6
    other = choices.followed()
    pretrain_parity.our_losses(SPARSE_TEXT, steps, seed=1, within=other.within)
    assert other.differing > len(choices.chosen) * pretrain_parity.ROWS * 256 // 2
    assert other.gap > 1e-3
    with pytest.raises(AssertionError, match="left over"):
        choices.followed().end()


def test_moved_weights_are_neighbours() -> None:
    model, before = pretrain_steps.started(SMALL), pretrain_steps.started(SMALL)
    pretrain_parity.move(model, 0)
    for weight, old in zip(model.parameters(), before.parameters(), strict=True):
        apart = (weight.view(torch.int32) - old.view(torch.int32)).abs()
        assert torch.equal(apart, torch.ones_like(apart))


def test_only_shares_of_the_whole_step_give_the_whole_batchs_gradient() -> None:
    found = pretrain_balance.errors()
    assert found["ours"] < 1e-6
    assert found["micro-batch"] > 0.1
    assert found["running average"] > 0.1


def test_chosen_metrics_are_printed_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", "--quick", "--only", "balance"])
    errors = {"ours": 2e-7, "micro-batch": 0.8, "running average": 1.1}
    monkeypatch.setattr(pretrain_balance, "errors", lambda: errors)
    pretrain.main()
    lines = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [line["peer"] for line in lines] == [0.8, 1.1]
    assert all(line["reached"] for line in lines)


@pytest.mark.slow
def test_peaks_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    from benchmarks.pretrain_memory import in_fresh_process

    save_model(pretrain_loading.random_model(replace(SMALL, vocab_size=2**21)), tmp_path)
    num_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert num_bytes <= in_fresh_process(f"load_peak({str(tmp_path)!r})") < 1.3 * num_bytes
