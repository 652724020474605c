"""GRPO: advantages against a naive twin, two steps on a tiny model, and a crash that leaves no trace."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import killed
import msgspec
import numpy as np
import pytest

from pensar.base.errors import ConfigError, DataError
from pensar.base.files import files_under, read_jsonl
from pensar.base.progress import Progress
from pensar.base.ranks import Crew, World
from pensar.base.stage import Runtime
from pensar.infer.rollout import RolloutConfig, roll
from pensar.infer.score import score
from pensar.infer.torch_runner import TorchRunner
from pensar.model.weights import load_model
from pensar.posttrain import grpo
from pensar.posttrain.grpo import MISMATCH, GrpoConfig, advantages, micro_batches, truncate_rollouts
from pensar.tasks.task import Task
from pensar.text.packing import Batch
from pensar.text.tokenizer import Tokenizer
from pensar.train.loop import Place
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import train_step

MakeRuntime = Callable[[str], Runtime]
SMALL = GrpoConfig(
    steps=3,
    prompts=4,
    group=6,
    minibatches=2,
    checkpoint_every=1,
    probe=0,
    rollout=RolloutConfig(max_tokens=32),
    optimizer=OptimizerConfig(muon=False, adamw_lr=0.002),
)


def naive_advantages(scores: Sequence[float]) -> list[float] | None:
    """(score - mean) / deviation over the group, in plain Python; None where all scores are alike."""
    if len(set(scores)) == 1:
        return None
    mean = sum(scores) / len(scores)
    deviation = (sum((value - mean) ** 2 for value in scores) / len(scores)) ** 0.5
    return [(value - mean) / deviation for value in scores]


def test_advantages_are_those_of_the_naive_twin() -> None:
    rng = np.random.default_rng(0)
    groups = [list(map(float, rng.integers(0, 2, 8))) for _ in range(40)] + [
        [0.0] * 8,
        [1.0] * 8,
        [0.25, 1.0, 0.5],
    ]
    for scores in groups:
        found, expected = advantages(scores), naive_advantages(scores)
        if expected is None:
            assert found is None
        else:
            assert found == pytest.approx(expected)
            assert sum(found) == pytest.approx(0, abs=1e-9)
    assert advantages([1.0]) is None


def run(config: GrpoConfig, school: Path, tasks: Path, out: Path, runtime: Runtime) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return grpo.run(config, {"model": school, "tasks": tasks}, out, runtime)


def test_what_is_learned_are_the_advantages_of_the_rollouts_that_were_kept(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Batch] = []

    def watched(*arguments: Any, **named: Any) -> dict[str, float]:
        seen.extend(arguments[2])
        return train_step(*arguments, **named)

    monkeypatch.setattr(grpo, "train_step", watched)
    config = msgspec.structs.replace(SMALL, steps=1)
    counts = run(config, school, guesses, tmp_path / "grpo", runtime("grpo"))
    assert counts == {"queries": 12, "rollouts": 24, "steps": 1}
    rows = list(read_jsonl(tmp_path / "grpo" / "rollouts.jsonl", dict))
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["task"])]
    assert [len(group) for group in groups] == [6] * 4
    expected: list[tuple[float, int]] = []
    for group in groups:
        learned = naive_advantages([row["score"] for row in group])
        if learned is not None:
            expected += [(round(a, 4), row["tokens"]) for a, row in zip(learned, group, strict=True)]
    found = [
        (round(float(stream[stream != 0][0]), 4), int((stream != 0).sum()))
        for batch in seen
        for stream in batch.pg
    ]
    assert 0 < len(expected) < 25
    assert sorted(found) == sorted(expected)
    (metrics,) = read_jsonl(tmp_path / "grpo" / "metrics.jsonl", dict)
    assert metrics["learned_share"] == pytest.approx(len(expected) / 24)
    assert metrics["reward"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert metrics["reward/logic"] == metrics["reward"]


def test_groups_that_all_fail_teach_nothing(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(SMALL, steps=1, rollout=RolloutConfig(max_tokens=2))
    monkeypatch.setattr(grpo, "train_step", lambda *_: pytest.fail("nothing to learn from"))
    run(config, school, guesses, tmp_path / "grpo", runtime("grpo"))
    (metrics,) = read_jsonl(tmp_path / "grpo" / "metrics.jsonl", dict)
    assert metrics["learned_share"] == 0
    assert metrics["unfinished"] == 1


@pytest.mark.parametrize("forward", ["torch", "engine"])
def test_every_step_says_how_far_the_trainer_is_from_the_engine(
    school: Path,
    guesses: Path,
    tmp_path: Path,
    runtime: MakeRuntime,
    monkeypatch: pytest.MonkeyPatch,
    forward: str,
) -> None:
    """By its first minibatch, whose weights are the engine's; exactly nothing where both compute alike."""
    told: list[dict[str, float]] = []

    def watched(*arguments: Any, **named: Any) -> dict[str, float]:
        assert arguments[0].training, "experts are balanced in training mode"
        told.append(train_step(*arguments, **named))
        return told[-1]

    monkeypatch.setattr(grpo, "train_step", watched)
    config = msgspec.structs.replace(SMALL, steps=2, forward=forward)
    run(config, school, guesses, tmp_path / "grpo", runtime("grpo"))
    rows = list(read_jsonl(tmp_path / "grpo" / "metrics.jsonl", dict))
    assert len(told) == 4
    for row, first, second in zip(rows, told[::2], told[1::2], strict=True):
        assert [row[key] for key in MISMATCH] == [first[key] for key in MISMATCH]
        assert row["policy_loss"] == second["policy_loss"]
        assert second["mismatch"] > 1e-3, "the second minibatch is off policy"
        assert 0 <= row["mismatch"] <= row["mismatch_max"] < 1e-4
        assert 0 <= row["mismatch_kl"] < 1e-8
        if forward == "engine":
            assert row["mismatch_max"] == row["mismatch_kl"] == 0
    assert forward == "engine" or rows[0]["mismatch_max"] > 0


def test_a_trainer_can_share_kernels_only_with_an_engine_that_has_them(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = grpo.Engine
    monkeypatch.setattr(
        grpo, "Engine", lambda model, *rest, **more: engine(TorchRunner(model), *rest, **more)
    )
    config = msgspec.structs.replace(SMALL, steps=1, forward="engine")
    with pytest.raises(ConfigError, match="forward is engine, and the engine computes with torch here"):
        run(config, school, guesses, tmp_path / "grpo", runtime("grpo"))
    run(msgspec.structs.replace(config, forward="auto"), school, guesses, tmp_path / "auto", runtime("auto"))
    (metrics,) = read_jsonl(tmp_path / "auto" / "metrics.jsonl", dict)
    assert metrics["mismatch_max"] < 1e-4


@pytest.mark.parametrize(("call", "forward"), [(1, "torch"), (4, "torch"), (4, "engine")])
def test_a_killed_run_goes_on_to_the_very_same_bytes(
    school: Path,
    guesses: Path,
    tmp_path: Path,
    runtime: MakeRuntime,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    forward: str,
) -> None:
    """The first kill is inside the first step, between its two minibatches; the second inside the third."""
    config = msgspec.structs.replace(SMALL, probe=3, easiest=1.0, forward=forward)
    run(config, school, guesses, tmp_path / "whole", runtime("whole"))
    with monkeypatch.context() as patch:
        killed.at_step(patch, grpo, call)
        with pytest.raises(killed.Killed):
            run(config, school, guesses, tmp_path / "cut", runtime("cut"))
    assert (tmp_path / "cut" / "checkpoint.pt").exists() == (call == 4)
    run(config, school, guesses, tmp_path / "cut", runtime("cut"))
    whole, cut = ({n: p.read_bytes() for n, p in files_under(tmp_path / f).items()} for f in ("whole", "cut"))
    assert whole == cut
    assert {"model.safetensors", "rollouts.jsonl", "metrics.jsonl", "pass-rates.json"} <= set(whole)
    assert {row["step"] for row in read_jsonl(tmp_path / "cut" / "rollouts.jsonl", dict)} == {0, 1, 2}
    assert whole["model.safetensors"] != (school / "model.safetensors").read_bytes()


def test_rewarded_replies_become_likelier_and_punished_ones_rarer(school: Path) -> None:
    model, tokenizer = load_model(school), Tokenizer.load(school)
    task = Task(
        id="x", family="logic", prompt="True or false, left to right: T or F", answer="T", thinking=False
    )
    rollouts = roll(
        grpo.Engine(model, tokenizer), tokenizer, [task] * 16, RolloutConfig(max_tokens=8), range(16)
    )
    scores = [rollout.score.value for rollout in rollouts]
    learned = advantages(scores)
    assert learned is not None

    def likelihoods() -> list[float]:
        """Of the sampled tokens of each reply."""
        scored = score(model, [np.asarray(r.tokens) for r in rollouts])
        return [float(np.dot(values, r.sampled)) for values, r in zip(scored, rollouts, strict=True)]

    before = likelihoods()
    rows = micro_batches([r.sample(float(a)) for r, a in zip(rollouts, learned, strict=True)], rows=5)
    assert [len(batch.tokens) for batch in rows] == [5, 5, 5, 1]
    optimizer = Optimizer(model, OptimizerConfig(muon=False, adamw_lr=0.001))
    train_step(model, optimizer, rows, 1.0, World(), LossConfig())
    for gain, value in zip(np.subtract(likelihoods(), before), scores, strict=True):
        assert (gain > 0) == (value == 1.0)


def queries_of(config: GrpoConfig, school: Path, tasks: Path, out: Path) -> list[Task]:
    out.mkdir(exist_ok=True)
    model, tokenizer = load_model(school), Tokenizer.load(school)
    place = Place(out, out.with_name("probe-logs"), World(), Progress())
    return grpo._queries(config, tasks, grpo.Engine(model, tokenizer), tokenizer, place)


def test_queries_are_chosen_by_how_often_they_are_solved(school: Path, guesses: Path, tmp_path: Path) -> None:
    config = msgspec.structs.replace(SMALL, probe=4, probe_queries=5, easiest=0.6)
    kept = queries_of(config, school, guesses, tmp_path / "probe")
    rates = msgspec.json.decode((tmp_path / "probe" / "pass-rates.json").read_bytes())
    assert len(rates) == 5
    assert all(rate * 4 == round(rate * 4) for rate in rates)
    everyone = list(read_jsonl(guesses / "train" / "reinforcement.jsonl", Task))
    wanted = [task.id for task, rate in zip(everyone, rates, strict=False) if 0 < rate <= 0.6]
    assert [task.id for task in kept] == wanted
    assert all(task.thinking is True for task in kept)
    (tmp_path / "probe" / "pass-rates.json").write_text("[1,0,0,0.5,0]")
    assert [task.id for task in queries_of(config, school, guesses, tmp_path / "probe")] == [everyone[3].id]
    (tmp_path / "probe" / "pass-rates.json").write_text("[1,0,0,0.75,0]")
    with pytest.raises(DataError, match="none of 5 queries is solved sometimes but not always"):
        queries_of(config, school, guesses, tmp_path / "probe")


def test_a_torn_last_line_of_the_rollouts_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_bytes(b'{"step":0}\n{"step":1}\n{"st')
    truncate_rollouts(tmp_path, 1)
    assert (tmp_path / "rollouts.jsonl").read_bytes() == b'{"step":0}\n'
    truncate_rollouts(tmp_path / "elsewhere", 1)


def test_two_ranks_share_the_prompts_and_draw_what_one_draws(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    config = msgspec.structs.replace(SMALL, steps=2, prompts=3)
    run(config, school, guesses, tmp_path / "one", runtime("one"))
    with Crew(ranks=2) as crew:
        pair = Runtime(logs=tmp_path / "two-logs", crew=crew)
        run(config, school, guesses, tmp_path / "two", pair)

    def drawn(folder: str, step: int) -> list[bytes]:
        rows = (tmp_path / folder / "rollouts.jsonl").read_bytes().splitlines()
        return [row for row in rows if msgspec.json.decode(row)["step"] == step]

    assert drawn("one", 0) == drawn("two", 0)
    assert len(drawn("two", 1)) == 18
    assert [row["mismatch_max"] for row in read_jsonl(tmp_path / "two" / "metrics.jsonl", dict)] == [0, 0]
