"""Benchmarks on a tiny model: counts that can be counted again, and the results of the whole suite."""

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from pensar.base.errors import ConfigError
from pensar.base.ranks import World
from pensar.base.stage import Runtime
from pensar.evaluate import benchmarks, suite
from pensar.evaluate.benchmarks import MODES, Mode, Sampling
from pensar.evaluate.costs import cost, size_of
from pensar.evaluate.heldout import held_out_texts
from pensar.evaluate.statistics import share
from pensar.evaluate.suite import EvaluateConfig, evaluate_model, with_positions
from pensar.infer.engine import Engine
from pensar.infer.rollout import RolloutConfig
from pensar.model.attention import Packed
from pensar.model.count import forward_flops_per_token
from pensar.tasks.task import Task
from pensar.text.tokenizer import Tokenizer
from tiny import taught

SHORT = Sampling(
    thinking=RolloutConfig(temperature=0.6, top_p=0.95, top_k=20, max_tokens=48),
    direct=RolloutConfig(temperature=0.7, top_p=0.8, top_k=20, max_tokens=24),
)
LOGIC = [
    Task(id=f"{a}{b}", family="logic", prompt=f"True or false, left to right: {a} or {b}", answer="FT"["T" in a + b])
    for a in "TF"
    for b in "TF"
] * 5  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return taught()[1]


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    return Engine(taught()[0], tokenizer, slots=64)


@pytest.mark.parametrize("mode", ["thinking", "non-thinking"])
def test_a_cell_counts_what_the_rollouts_say(engine: Engine, tokenizer: Tokenizer, mode: Mode) -> None:
    cell, rollouts = benchmarks.run_benchmark(engine, tokenizer, LOGIC, mode, SHORT, World(), 1)
    right = 0
    for task, rollout in zip(LOGIC, rollouts, strict=True):
        reply = rollout.turns[-1]
        thought = bool(reply.reasoning_content)
        good = (
            reply.content.strip() == task.answer
            and thought == (mode == "thinking")
            and rollout.finish == "stop"
        )
        assert rollout.score.value == float(good)
        right += good
    assert 0 < right < 20
    assert cell.estimate == share(right, 20)
    assert cell.families == {"logic": right / 20}
    assert cell.tokens == pytest.approx(np.mean([sum(rollout.sampled) for rollout in rollouts]))
    again, _ = benchmarks.run_benchmark(engine, tokenizer, LOGIC, mode, SHORT, World(), 1)
    assert again == cell


def test_flags_decide_the_mode_of_think_follow(engine: Engine, tokenizer: Tokenizer, sets: Path) -> None:
    tasks = benchmarks.problems(sets, "think_follow")
    cell, rollouts = benchmarks.run_benchmark(engine, tokenizer, tasks, "flags", SHORT, World(), 1)
    assert (cell.benchmark, cell.mode, cell.estimate.n) == ("think_follow", "flags", 12)
    for task, rollout in zip(tasks, rollouts, strict=True):
        assert rollout.task == task
        if rollout.score.value:
            assert bool(rollout.turns[-1].reasoning_content) == task.thinking


def test_a_budget_of_nothing_still_asks_for_an_answer(engine: Engine, tokenizer: Tokenizer) -> None:
    curve = benchmarks.budget_curve(engine, tokenizer, LOGIC, [0, 30], SHORT, World(), 1)
    assert [budget for budget, _ in curve] == [0, 30]
    assert all(estimate.n == 20 for _, estimate in curve)
    thinking, _ = benchmarks.run_benchmark(engine, tokenizer, LOGIC, "thinking", SHORT, World(), 1)
    assert curve[1][1] == thinking.estimate, "a budget that is never reached changes nothing"


def test_pass_at_k_counts_problems_of_which_one_sample_is_right(engine: Engine, tokenizer: Tokenizer) -> None:
    first, many = benchmarks.pass_curve(engine, tokenizer, LOGIC[:4], 4, World(), 1)
    asked = [benchmarks.with_mode(task, True) for task in LOGIC[:4] for _ in range(4)]
    rollouts = benchmarks.rolled(engine, tokenizer, asked, RolloutConfig(max_tokens=128), World(), 1)
    right = np.array([rollout.score.value for rollout in rollouts]).reshape(4, 4)
    assert first.score == pytest.approx(right.mean())
    assert many.score == pytest.approx(right.any(1).mean())
    assert first.n == many.n == 4


def test_recall_compares_greedy_continuations(engine: Engine, tokenizer: Tokenizer, sets: Path) -> None:
    tasks = benchmarks.problems(sets, "recall")
    right = 0
    for task in tasks:
        ids = tokenizer.encode(task.prompt)
        for _ in tokenizer.encode(task.answer):
            with torch.no_grad():
                hidden = engine.model(torch.tensor([ids]), torch.arange(len(ids))[None], Packed())
            ids.append(int(engine.model.logits(hidden[0, -1]).argmax()))
        right += tokenizer.decode(ids[len(tokenizer.encode(task.prompt)) :]) == task.answer
    cell = benchmarks.recall(engine, tokenizer, tasks, World())
    assert cell.estimate == share(right, 12)
    assert cell.tokens == pytest.approx(np.mean([len(tokenizer.encode(task.prompt)) for task in tasks]))


def test_bits_per_byte_are_the_negative_log_likelihood_over_the_bytes(
    engine: Engine, tokenizer: Tokenizer, shards: Path
) -> None:
    texts = held_out_texts(shards, tokenizer, 32, 3)
    assert [len(tokens) for tokens, _ in texts] == [32] * 3
    for tokens, size in texts:
        assert size == len(tokenizer.decode(tokens).encode()) - len(tokenizer.decode(tokens[:1]).encode())
    found = benchmarks.bits_per_byte(engine.model, texts, World())
    for (tokens, size), bits in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = engine.model(torch.tensor([tokens]), torch.arange(32)[None], Packed())
        logprobs = engine.model.logits(hidden[0]).detach().double().log_softmax(-1)
        expected = -sum(float(logprobs[i, token]) for i, token in enumerate(tokens[1:]))
        assert bits == pytest.approx(expected / math.log(2) / size, rel=1e-4)
    assert held_out_texts(shards, tokenizer, 1000, 3) == []
    assert len(held_out_texts(shards, tokenizer, 21, 99)) == 8


def test_more_positions_leave_the_weights_alone(engine: Engine) -> None:
    longer = with_positions(engine.model, 4096)
    assert longer.config.max_positions == 4096
    assert torch.equal(longer.model.embed_tokens.weight, engine.model.model.embed_tokens.weight)
    assert with_positions(engine.model, 8).config.max_positions == engine.model.config.max_positions


def test_any_model_directory_is_evaluated_by_name(school: Path, sets: Path) -> None:
    rows = evaluate_model(school, sets, names=("think_follow", "reasoning"), limit=5, sampling=SHORT)
    assert [(row["benchmark"], row["mode"]) for row in rows] == [
        ("think_follow", "flags"),
        ("reasoning", "thinking"),
        ("reasoning", "non-thinking"),
    ]
    for row in rows:
        assert row["n"] == 5
        assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1
        assert row["after_stage"] == ""


def test_what_cannot_be_evaluated_is_refused_with_what_can(school: Path, sets: Path, tmp_path: Path) -> None:
    known = ", ".join(MODES)
    with pytest.raises(ConfigError, match=rf"unknown benchmark 'reasonin'; there are: {known}"):
        evaluate_model(school, sets, names=("reasonin",))
    with pytest.raises(ConfigError, match=r"no benchmark 'recall' in .*; there are: none"):
        evaluate_model(school, tmp_path, names=("recall",))
    with pytest.raises(ConfigError, match=r"no problem of .*recall.jsonl is left under limit 0"):
        evaluate_model(school, sets, names=("recall",), limit=0)


def test_the_cost_counts_drawn_and_learned_tokens(school: Path, tmp_path: Path) -> None:
    for file in school.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = [{"step": 0, "tokens": 10}, {"step": 0, "tokens": 30}]
    (tmp_path / "rollouts.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":0,"tokens":100.0,"reward":0.5}\n')
    model = taught()[0]
    forward = forward_flops_per_token(model.config, 50)
    assert cost(tmp_path).samples == 2
    assert cost(tmp_path).flops == pytest.approx((40 + 3 * 100) * forward)
    assert cost(tmp_path, school).flops == pytest.approx((40 + 4 * 100) * forward)
    assert cost(school).samples == 0
    assert size_of(school) == sum(parameter.numel() for parameter in model.parameters())


def test_the_suite_writes_every_table_of_the_report(
    school: Path, sets: Path, shards: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig(
        limit=3,
        sampling=SHORT,
        budgets=(0, 8),
        pass_problems=2,
        pass_samples=2,
        long_length=24,
        long_texts=2,
        conversations=1,
    )
    roles = (*suite.CHAT_STAGES, *suite.BASE_STAGES, *suite.STUDENTS.values())
    inputs = {"tasks": sets, "shards": shards} | dict.fromkeys(roles, school)
    counts = suite.run(config, inputs, tmp_path, Runtime(logs=tmp_path / "logs"))
    results = msgspec.json.decode((tmp_path / suite.RESULTS).read_bytes())
    assert set(results) == {
        "stage_table",
        "conversations",
        "validation",
        "budget_curve",
        "budget_references",
        "rl_against_distillation",
        "long_context",
        "think_follow",
    }
    table = results["stage_table"]
    assert counts == {"cells": len(table)}
    cells = [(benchmark, mode) for benchmark, modes in MODES.items() for mode in modes if mode != "base"]
    for stage in ("cold-start", "reasoning-rl", "fusion", "general-rl"):
        assert [(r["benchmark"], r["mode"]) for r in table if r["after_stage"] == stage] == cells
    assert all({"score", "low", "high", "n", "families", "tokens"} <= set(row) for row in table)
    assert [row["budget"] for row in results["budget_curve"]] == [0, 8]
    assert all({"accuracy", "low", "high", "n"} <= set(row) for row in results["budget_curve"])
    assert set(results["budget_references"]) == {"thinking", "non_thinking"}
    methods = results["rl_against_distillation"]
    assert [row["method"] for row in methods] == list(suite.STUDENTS)
    keys = {
        "stage",
        "pass_at_1",
        "pass_at_1_low",
        "pass_at_1_high",
        "pass_at_k",
        "k",
        "samples",
        "cost_flops",
    }
    assert all(keys <= set(row) for row in methods)
    assert [(row["after_stage"], row["benchmark"]) for row in results["long_context"]] == [
        ("pretrain-reasoning", "bits_per_byte"),
        ("pretrain-reasoning", "recall"),
        ("pretrain-long", "bits_per_byte"),
        ("pretrain-long", "recall"),
    ]
    assert [row["stage"] for row in results["validation"]] == ["cold-start", "reasoning-rl"]
    assert set(results["think_follow"]) == {"score", "low", "high", "n"}
    assert len(results["conversations"]) == len(cells)
    assert all({"title", "mode", "score", "messages"} == set(row) for row in results["conversations"])
