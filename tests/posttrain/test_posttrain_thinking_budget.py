"""The thinking budgets' stage: what it learns from, what its curve says, where a model's user finds it, and a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from pensar.base.errors import ConfigError, DataError, ModelError
from pensar.base.files import files_under, read_jsonl, seed_of
from pensar.base.ranks import Crew, World
from pensar.base.stage import Runtime
from pensar.infer.adaptive import AdaptiveBudget
from pensar.infer.engine import Engine
from pensar.infer.llm import LLM
from pensar.infer.rollout import RolloutConfig, roll
from pensar.infer.step import StepBatch, StepOutput
from pensar.model.weights import load_model
from pensar.posttrain import thinking_budget
from pensar.posttrain.thinking_budget import (
    Answered,
    Point,
    ThinkingBudgetConfig,
    enough,
    prompt_states,
)
from pensar.recipe import links, load, stages
from pensar.tasks.problems import with_mode
from pensar.tasks.task import Task
from pensar.text.tokenizer import Tokenizer

MakeRuntime = Callable[[str], Runtime]
ROOT = Path(__file__).parent.parent.parent
CONFIG = ThinkingBudgetConfig(
    num_queries=20,
    samples=3,
    held_out=6,
    shares=(0.4, 0.9),
    rollout=RolloutConfig(max_tokens=32, temperature=0.8),
)


@pytest.fixture
def questions(tmp_path: Path, guesses: Path) -> Path:
    """Twice the queries of which the taught model answers about half, and one that wants no thinking."""
    path = guesses / "train" / "reinforcement.jsonl"
    tasks = list(read_jsonl(path, Task))
    again = [msgspec.structs.replace(task, id=f"{task.id}-again") for task in tasks]
    direct = msgspec.structs.replace(tasks[0], id="direct", thinking=False)
    more = [msgspec.structs.replace(task, id=f"{task.id}-more") for task in tasks[:6]]
    path.write_bytes(b"".join(msgspec.json.encode(task) + b"\n" for task in (direct, *tasks, *again, *more)))
    return guesses


def ran(
    school: Path, tasks: Path, out: Path, runtime: Runtime, config: ThinkingBudgetConfig = CONFIG
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return thinking_budget.run(config, {"model": school, "tasks": tasks}, out, runtime)


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_under(folder).items()}


def test_the_artifact_is_the_model_and_its_users_find_the_budgets(
    school: Path, questions: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    out = tmp_path / "budgets"
    counts = ran(school, questions, out, runtime("budgets"))
    model = bytes_under(school)
    assert set(bytes_under(out)) == {
        *model,
        "thinking_budget.safetensors",
        "answers.jsonl",
        "budget_curve.jsonl",
    }
    assert (out / "model.safetensors").read_bytes() == model["model.safetensors"]
    answered = list(read_jsonl(out / "answers.jsonl", Answered))
    assert len(answered) == counts["queries"] == 20
    assert counts["learned_from"] == sum(bool(answer.reasoning) for answer in answered) >= 16
    assert "direct" not in {answer.task for answer in answered}

    llm = LLM(out)
    question = [{"role": "user", "content": "True or false, left to right: T and F"}]
    free = llm.chat(question, seed=3, temperature=0.0)
    assert free.usage.reasoning_tokens > 2
    assert llm.engine.adaptive is not None
    tasks = list(read_jsonl(questions / "train" / "reinforcement.jsonl", Task))
    prompt = next(task for task in tasks if task.prompt == question[0]["content"])
    state = prompt_states(llm.model, llm.tokenizer, [prompt], World())[0]
    budget = llm.engine.adaptive.budget(state, 0.9)
    assert llm.chat(question, temperature=0.0, adaptive_budget=0.9).usage.reasoning_tokens == min(
        free.usage.reasoning_tokens, budget
    )
    with pytest.raises(ModelError, match="has no learned"):
        LLM(school).chat(question, adaptive_budget=0.9)


def test_what_was_learned_from_are_the_right_replies_to_each_question(
    school: Path, questions: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    ran(school, questions, tmp_path / "budgets", runtime("budgets"))
    model, tokenizer = load_model(school), Tokenizer.load(school)
    tasks = [with_mode(t, True) for t in read_jsonl(questions / "train" / "reinforcement.jsonl", Task)][1:21]
    engine = Engine(model, tokenizer)
    answered = list(read_jsonl(tmp_path / "budgets" / "answers.jsonl", Answered))
    solved = []
    for number, (task, answer) in enumerate(zip(tasks, answered, strict=True)):
        seeds = [seed_of(1, "thinking budget", number, n) for n in range(3)]
        lengths = []
        for rollout in roll(engine, tokenizer, [task] * 3, CONFIG.rollout, seeds):
            thought = rollout.turns[0].reasoning_content
            if rollout.score.value == 1:
                assert thought is not None
                lengths.append(rollout.reasoning[0])
                close = tokenizer.special("</think>")
                inside = rollout.tokens[: rollout.tokens.index(close, rollout.sampled.index(True))]
                assert rollout.reasoning[0] == len(inside) - inside.index(tokenizer.special("<think>")) - 1
        assert answer == Answered(task=task.id, reasoning=lengths)
        solved += [number] if lengths else []
    states = prompt_states(model, tokenizer, tasks, World())[solved]
    again = AdaptiveBudget.fit(states, [answered[i].reasoning for i in solved])
    kept = AdaptiveBudget.load(tmp_path / "budgets", model.config.hidden_size)
    assert kept is not None
    assert [again.budget(state, 0.7) for state in states] == [kept.budget(state, 0.7) for state in states]


def test_the_states_are_those_that_the_engine_draws_first_tokens_from(school: Path, questions: Path) -> None:
    model, tokenizer = load_model(school), Tokenizer.load(school)
    tasks = [with_mode(t, True) for t in read_jsonl(questions / "train" / "reinforcement.jsonl", Task)][1:6]
    engine = Engine(model, tokenizer)
    seen: list[torch.Tensor] = []
    whole = engine.runner.run

    def watched(batch: StepBatch) -> StepOutput:
        output = whole(batch)
        seen.append(output.hidden_SD[-1])
        return output

    engine.runner.run = watched  # type: ignore[method-assign]
    states = prompt_states(model, tokenizer, tasks, World())
    for task, state in zip(tasks, states, strict=True):
        seen.clear()
        roll(engine, tokenizer, [task], CONFIG.rollout, [1])
        torch.testing.assert_close(seen[0], state, rtol=1e-4, atol=1e-4)


def test_the_curve_is_what_an_engine_does_under_each_budget(
    school: Path, questions: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    out = tmp_path / "budgets"
    ran(school, questions, out, runtime("budgets"))
    points = list(read_jsonl(out / "budget_curve.jsonl", Point))
    assert [(point.way, point.share) for point in points] == [
        ("unlimited", 1.0),
        ("fixed", 0.4),
        ("learned", 0.4),
        ("fixed", 0.9),
        ("learned", 0.9),
    ]
    free = points[0]
    assert free.budget is None
    assert free.sufficed == 1
    assert all(point.questions == 6 and point.reasoning_tokens <= free.reasoning_tokens for point in points)
    first = [
        answer.reasoning[0] for answer in read_jsonl(out / "answers.jsonl", Answered) if answer.reasoning
    ]
    tasks = [with_mode(t, True) for t in read_jsonl(questions / "train" / "reinforcement.jsonl", Task)][21:27]
    engine = Engine(load_model(school), Tokenizer.load(school))
    engine.adaptive = AdaptiveBudget.load(out, engine.model.config.hidden_size)
    seeds = [seed_of(1, "thinking budget", "held out", i) for i in range(6)]
    for point in points[1:]:
        budget = enough(first, point.share) if point.way == "fixed" else None
        asked = msgspec.structs.replace(
            CONFIG.rollout,
            thinking_budget=budget,
            adaptive_budget=point.share if point.way == "learned" else 0.0,
        )
        rollouts = roll(engine, Tokenizer.load(school), tasks, asked, seeds)
        assert point.reasoning_tokens == pytest.approx(np.mean([r.reasoning[0] for r in rollouts]), abs=1e-3)
        stopped = [not all(r.sampled[r.sampled.index(True) :]) for r in rollouts]
        assert point.sufficed == pytest.approx(1 - np.mean(stopped), abs=1e-3)
        if budget is not None:
            assert point.budget == budget
            assert all(r.reasoning[0] <= budget for r in rollouts)


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_killed_stage_goes_on_to_the_very_same_bytes(
    school: Path,
    questions: Path,
    tmp_path: Path,
    runtime: MakeRuntime,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    """Killed within the answers, before the curve, and within the curve; with a torn last line each time."""
    monkeypatch.setattr(thinking_budget, "BLOCK", 12)
    ran(school, questions, tmp_path / "whole", runtime("whole"))
    whole, asked = thinking_budget.roll_shared, []
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:

        def dying(*arguments: Any, **named: Any) -> Any:
            if len(asked) == after:
                raise RuntimeError("killed")
            asked.append(len(arguments[2]))
            return whole(*arguments, **named)

        patch.setattr(thinking_budget, "roll_shared", dying)
        with pytest.raises(RuntimeError, match="killed"):
            ran(school, questions, cut, runtime("cut"))
    with (cut / ("answers.jsonl" if after < 3 else "budget_curve.jsonl")).open("ab") as file:
        file.write(b'{"task":"to')
    asked.clear()

    def counting(*arguments: Any, **named: Any) -> Any:
        asked.append(len(arguments[2]))
        return whole(*arguments, **named)

    monkeypatch.setattr(thinking_budget, "roll_shared", counting)
    ran(school, questions, cut, runtime("cut"))
    assert bytes_under(cut) == bytes_under(tmp_path / "whole")
    assert asked == {1: [24, *[6] * 5], 2: [24, *[6] * 5], 4: [24, *[6] * 3]}[after]


def test_two_ranks_learn_what_one_learns(
    school: Path, questions: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    ran(school, questions, tmp_path / "one", runtime("one"))
    with Crew(ranks=2, threads=1) as crew:
        ran(school, questions, tmp_path / "two", Runtime(logs=tmp_path / "two-logs", crew=crew))
    one, two = bytes_under(tmp_path / "one"), bytes_under(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in ("answers.jsonl", "model.safetensors"):
        assert one[name] == two[name]
    left, right = (AdaptiveBudget.load(tmp_path / name, 48) for name in ("one", "two"))
    assert left is not None
    assert right is not None
    torch.testing.assert_close(left.weight_D, right.weight_D, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_learned_is_told(
    school: Path, questions: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    many = msgspec.structs.replace(CONFIG, held_out=30)
    with pytest.raises(DataError, match="has 30 queries to think about, 30 are held out"):
        ran(school, questions, tmp_path / "many", runtime("many"), many)
    few = msgspec.structs.replace(CONFIG, num_queries=3)
    with pytest.raises(
        DataError, match="answered questions to learn thinking budgets from; give at least 16"
    ):
        ran(school, questions, tmp_path / "few", runtime("few"), few)
    with pytest.raises(ConfigError, match=r"shares \[0.5, 1.0\] between 0 and 1"):
        ThinkingBudgetConfig(shares=(0.5, 1.0))
    with pytest.raises(ConfigError, match="leave thinking_budget and adaptive_budget out"):
        ThinkingBudgetConfig(rollout=RolloutConfig(adaptive_budget=0.5))


def test_one_budget_for_all_is_the_quantile_that_new_questions_keep_to() -> None:
    """Of n lengths and one more, each is equally likely to rank anywhere."""
    assert [enough([5, 1, 3], share) for share in (0.2, 0.25, 0.26, 0.5, 0.75, 0.99)] == [1, 1, 3, 3, 5, 5]
    rng = np.random.default_rng(0)
    kept = [rng.integers(0, 1_000) <= enough(rng.integers(0, 1_000, 19).tolist(), 0.8) for _ in range(4_000)]
    assert np.mean(kept) == pytest.approx(0.8, abs=0.03)


def test_a_recipe_has_the_stage_where_it_asks_for_one_and_shows_its_model() -> None:
    path = ROOT / "recipes" / "tiny.yaml"
    plain, asking = load(path, ["thinking_budget=null"]), load(path, ["thinking_budget.samples=2"])
    added = {stage.name: stage for stage in stages(asking)}
    assert added.keys() - {stage.name for stage in stages(plain)} == {"thinking-budget"}
    assert added["thinking-budget"].inputs == {"model": "general-rl", "tasks": "tasks"}
    assert added["thinking-budget"].config.seed == plain.seed  # type: ignore[attr-defined]
    assert (links(plain), links(asking)) == ({"model": "general-rl"}, {"model": "thinking-budget"})
