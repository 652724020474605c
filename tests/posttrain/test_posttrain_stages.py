"""Cold start, fusion and distillation: what they build, what they drop, and that a crash leaves no trace."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import msgspec
import numpy as np
import pytest
import torch

from pensar.base.errors import DataError
from pensar.base.files import files_under, read_jsonl
from pensar.base.stage import Runtime
from pensar.infer.engine import Engine
from pensar.infer.rollout import Rollout, RolloutConfig, roll
from pensar.model.weights import load_model, save_model
from pensar.posttrain import coldstart, distill, fusion
from pensar.posttrain.coldstart import ColdStartConfig, WorkedTeacher
from pensar.posttrain.distill import OffPolicyConfig, OnPolicyConfig, examples_of
from pensar.posttrain.examples import Example, encode, in_batches
from pensar.posttrain.fusion import FusionConfig, Shares, curated_examples, direct_examples, interrupted
from pensar.tasks.families import FAMILIES, draw
from pensar.tasks.instructions import instruction
from pensar.tasks.modes import flagged
from pensar.tasks.problems import held_out, statement, with_mode
from pensar.tasks.task import Task
from pensar.tasks.tools import tool_task
from pensar.tasks.verifiers import Score, gold
from pensar.text.chat import EMPTY_THINKING, encode_stop_sentence, mode_of, render
from pensar.text.sample import Sample
from pensar.text.tokenizer import Tokenizer
from pensar.train import loop
from tiny import SPARSE, taught, tiny_model

MakeRuntime = Callable[[str], Runtime]
FAULTLESS = WorkedTeacher(hasty=0.0, wrong=0.0, guess=0.0, repeat=0.0, disagree=0.0, mixed=0.0)
ROLLOUT = RolloutConfig(max_tokens=32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return taught()[1]


def reasoning_tasks(*counts: tuple[str, int]) -> list[Task]:
    return [draw(family, "train", random.Random(n)) for family, num in counts for n in range(num)]


def learned(tokenizer: Tokenizer, example: Example) -> str:
    """The text that the example teaches."""
    (sample,) = encode(tokenizer, [example])
    assert sample.ce is not None
    return tokenizer.decode([int(t) for t, w in zip(sample.tokens, sample.ce, strict=True) if w])


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_under(folder).items()}


# ---------------------------------------------------------------- cold start


def test_the_cold_start_keeps_the_worked_solution_and_says_why_the_rest_is_dropped() -> None:
    tasks = reasoning_tasks(("chain", 6), ("logic", 4))
    twofold = msgspec.structs.replace(tasks[0], id="twofold", prompt="1? 2?")
    solved, leak = tasks[1].id, tasks[2]
    config = ColdStartConfig(teacher=FAULTLESS, candidates=2)
    validation = [msgspec.structs.replace(leak, id="v")]
    examples, dropped = coldstart.build(config, [*tasks, twofold], {solved}, validation)
    assert Counter(row["reason"] for row in dropped) == {
        "query: solved without reasoning": 1,
        "query: several questions": 1,
        "response: similar to validation": 2,
    }
    assert Counter(example.kind for example in examples) == {"chain": 4, "logic": 4}
    for example in examples:
        task = next(task for task in tasks if task.id == example.id)
        question, reply = example.conversation.messages
        assert question.content == task.prompt
        assert (reply.reasoning_content, reply.content) == (task.solution, task.answer)
        assert example.id not in {solved, leak.id, "twofold"}


def test_no_family_gets_more_than_its_share() -> None:
    tasks = reasoning_tasks(("chain", 9), ("logic", 5))
    config = ColdStartConfig(teacher=FAULTLESS)
    few = msgspec.structs.replace(config, max_examples=9)
    assert Counter(e.kind for e in coldstart.build(few, tasks, set(), [])[0]) == {"chain": 4, "logic": 4}
    assert coldstart.build(config, [], set(), []) == ([], [])


def test_a_second_candidate_may_pass_where_the_first_fails() -> None:
    tasks = reasoning_tasks(("chain", 60))
    shares = msgspec.structs.replace(FAULTLESS, wrong=0.5)
    one, two = (
        coldstart.build(ColdStartConfig(teacher=shares, candidates=n), tasks, set(), []) for n in (1, 2)
    )
    assert 15 < len(one[0]) < 45
    assert len(one[0]) + len(one[1]) == 60
    assert len(two[0]) > len(one[0])
    assert all(row["reason"] == "response: wrong answer" and row["reply"] for row in two[1])


def test_the_cold_start_stage_writes_what_it_kept_and_what_it_dropped(
    school: Path, sets: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    config = ColdStartConfig(steps=2, batch_size=4)
    (tmp_path / "cold").mkdir()
    counts = coldstart.run(config, {"model": school, "tasks": sets}, tmp_path / "cold", runtime("cold"))
    examples = list(read_jsonl(tmp_path / "cold" / "examples.jsonl", Example))
    dropped = list(read_jsonl(tmp_path / "cold" / "dropped.jsonl", dict))
    assert counts["queries"] == 60
    assert counts["examples"] == len(examples) > 0
    assert counts["dropped"] == Counter(row["reason"] for row in dropped)
    assert (tmp_path / "cold" / "model.safetensors").read_bytes() != (
        school / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "cold" / "checkpoint.pt").exists()


def test_nothing_left_to_learn_from_is_told(
    school: Path, sets: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    config = ColdStartConfig(steps=2, teacher=msgspec.structs.replace(FAULTLESS, wrong=1.0))
    with pytest.raises(DataError, match="no example is left to learn from: every candidate was dropped"):
        coldstart.run(config, {"model": school, "tasks": sets}, tmp_path, runtime("cold"))


# ---------------------------------------------------------------- order of the examples


def test_every_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    lengths = np.random.default_rng(0).integers(3, 30, 40)
    samples = [Sample(tokens=np.full(n, i, np.int32)) for i, n in enumerate(lengths)]
    batches_of = in_batches(samples, 4, seed=1)
    epochs = []
    for epoch in range(2):
        shown = [int(row[0]) for step in range(10) for b in batches_of(10 * epoch + step) for row in b.tokens]
        assert sorted(shown) == list(range(40))
        epochs.append(shown)
    assert epochs[0] != epochs[1]
    again = in_batches(samples, 4, seed=1)
    assert (again(13)[0].tokens == batches_of(13)[0].tokens).all()
    assert (again(2)[0].tokens == batches_of(2)[0].tokens).all()
    padding = np.mean([(batches_of(step)[0].segments == 0).mean() for step in range(10)])
    assert padding < 0.25
    assert len(in_batches(samples[:3], 8, seed=1)(5)[0].tokens) == 3


# ---------------------------------------------------------------- fusion


def test_non_thinking_examples_have_a_flag_and_an_empty_block(tokenizer: Tokenizer) -> None:
    tasks = reasoning_tasks(("chain", 30), ("logic", 10))
    examples = direct_examples(FusionConfig(shares=Shares(direct=35, direct_steps=9)), tasks)
    assert [example.id for example in examples] == [task.id for task in tasks[-35:]]
    turns, flags = set(), 0
    for example, task in zip(examples, tasks[-35:], strict=True):
        assert mode_of(example.conversation) is False
        asked = example.conversation.messages[-2].content
        flags += asked.endswith("/no_think")
        assert asked.endswith("/no_think") or len(example.conversation.messages) > 2
        text = render(example.conversation)
        assert text.endswith(f"<|im_start|>assistant\n{EMPTY_THINKING}{task.answer}<|im_end|>\n")
        assert learned(tokenizer, example) == f"{EMPTY_THINKING}{task.answer}<|im_end|>"
        turns.add(len(example.conversation.messages))
    assert turns == {2, 4, 6}
    assert 20 < flags < 35
    assert direct_examples(FusionConfig(shares=Shares(direct=0)), tasks) == []
    assert len(direct_examples(FusionConfig(shares=Shares(direct=99, direct_steps=9)), tasks)) == 40
    at_a_glance = direct_examples(FusionConfig(shares=Shares(direct=99, direct_steps=3)), tasks)
    assert [example.id for example in at_a_glance] == [task.id for task in tasks if task.difficulty <= 3]


def test_curated_examples_obey_their_modes_and_leave_the_held_out_problems_out(
    tokenizer: Tokenizer, sets: Path
) -> None:
    config = FusionConfig(shares=Shares(instructions=60, tools=60))
    free = curated_examples(config, set())
    drawn = {statement(instruction(random.Random(n), "train")) for n in range(600)}
    for barred in (held_out(sets), drawn):
        for example in curated_examples(config, barred):
            prompt, answer = (example.conversation.messages[index].content for index in (0, -1))
            assert statement(Task(id="", family="", prompt=prompt, answer=answer)) not in barred
    modes: Counter[tuple[str, bool]] = Counter()
    for example in free:
        thinking = mode_of(example.conversation) is not False
        text = learned(tokenizer, example)
        assert text.startswith("<think>\n")
        assert text.startswith(EMPTY_THINKING) == (not thinking)
        assert text.endswith("<|im_end|>")
        modes[example.kind, thinking] += 1
        called = "<tool_call>" in text
        assert called <= (example.kind == "tools")
        if example.kind == "tools":
            assert example.conversation.tools
    assert min(modes.values()) > 10
    assert len(modes) == 4


def test_fusion_keeps_the_model_s_right_replies_under_flags(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime, tokenizer: Tokenizer
) -> None:
    shares = Shares(thinking=30, direct=10, instructions=5, tools=5, history=0.5)
    config = FusionConfig(steps=2, batch_size=8, shares=shares, rollout=ROLLOUT)
    (tmp_path / "fused").mkdir()
    counts = fusion.run(config, {"model": school, "tasks": guesses}, tmp_path / "fused", runtime("fused"))
    examples = list(read_jsonl(tmp_path / "fused" / "examples.jsonl", Example))
    kinds = Counter(example.kind for example in examples)
    cut = len((tmp_path / "fused" / "interrupted.jsonl").read_text().splitlines())
    assert cut == kinds["thinking"]
    assert counts["kinds"] == kinds | {"interrupted": cut}
    assert counts["examples"] == len(examples) + cut
    assert counts["rejected"] == 12 - kinds["thinking"]
    assert 0 < kinds["thinking"] < 12
    answers = {task.id: task.answer for task in read_jsonl(guesses / "train" / "cold_start.jsonl", Task)}
    for example in examples:
        if example.kind == "thinking":
            assert mode_of(example.conversation) is not False
            reply = example.conversation.messages[-1]
            assert reply.reasoning_content
            assert reply.content.strip() == answers[example.id]
            assert not learned(tokenizer, example).startswith(EMPTY_THINKING)


def test_interrupted_reasoning_has_the_tokens_that_a_thinking_budget_leaves(
    school: Path, guesses: Path, tokenizer: Tokenizer
) -> None:
    engine = Engine(load_model(school), Tokenizer.load(school), slots=4)
    task = with_mode(next(read_jsonl(guesses / "train" / "cold_start.jsonl", Task)), True)
    greedy = RolloutConfig(temperature=0.0, max_tokens=96)
    (free,) = roll(engine, tokenizer, [task], greedy, [0])
    assert free.turns[0].reasoning_content
    lengths = set()
    for number in range(12):
        sample = interrupted(tokenizer, free, random.Random(number))
        text = tokenizer.decode([int(token) for token in sample.tokens])
        budget = sum(sample.ce == 0) - free.sampled.index(True) - 1 - len(encode_stop_sentence(tokenizer))
        (stopped,) = roll(
            engine, tokenizer, [task], msgspec.structs.replace(greedy, thinking_budget=int(budget)), [0]
        )
        end = int(np.flatnonzero(sample.ce)[0])
        assert stopped.tokens[:end] == list(sample.tokens[:end]), text
        assert tokenizer.decode([int(t) for t in sample.tokens[end:]]) == f"{free.turns[0].content}<|im_end|>"
        lengths.add(int(budget))
    assert len(lengths) > 2


# ---------------------------------------------------------------- distillation


def rollout(task: Task, right: bool = True) -> Rollout:
    return Rollout(task, [1], [True], [0.0], turns=list(gold(task)), finish="stop", score=Score(float(right)))


def test_every_assistant_turn_of_a_rollout_is_an_example(tokenizer: Tokenizer) -> None:
    look = next(
        task for task in (tool_task(random.Random(n), "train") for n in range(20)) if task.environment
    )
    words = look.arguments["call"]["arguments"]["words"]
    thinking = examples_of(rollout(with_mode(look, True)))
    assert [len(example.conversation.messages) for example in thinking] == [2, 4]
    assert all(example.thinking is None and example.conversation.tools for example in thinking)
    assert learned(tokenizer, thinking[0]).startswith(f"<think>\nlookup {words}\n</think>\n\n<tool_call>")
    assert learned(tokenizer, thinking[1]) == (
        f"<think>\ncode {look.answer}\n</think>\n\n{look.answer}<|im_end|>"
    )


def test_what_the_prompt_gave_is_not_learned_and_what_the_flag_asked_is(tokenizer: Tokenizer) -> None:
    task = FAMILIES["chain"][0](random.Random(0), 2)
    (given,) = examples_of(rollout(with_mode(task, False)))
    assert given.thinking is False
    assert learned(tokenizer, given) == f"{task.answer}<|im_end|>"
    (asked,) = examples_of(rollout(flagged(task, False, random.Random(0))))
    assert asked.thinking is None
    assert learned(tokenizer, asked) == f"{EMPTY_THINKING}{task.answer}<|im_end|>"
    blank = rollout(with_mode(task, False))
    blank.turns = [msgspec.structs.replace(blank.turns[0], reasoning_content="\n")]
    (clean,) = examples_of(blank)
    assert clean.conversation.messages[-1].reasoning_content is None
    assert learned(tokenizer, clean) == learned(tokenizer, given)


def on_policy_config(**changes: Any) -> OnPolicyConfig:
    config = OnPolicyConfig(steps=3, prompts=4, checkpoint_every=1, rollout=ROLLOUT, thinking_share=0.5)
    return msgspec.structs.replace(config, **changes)


def distilled(
    run: Callable[..., Any], config: Any, inputs: dict[str, Path], out: Path, runtime: Runtime
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    counts: dict[str, Any] = run(config, inputs, out, runtime)
    return counts


def test_on_policy_distillation_killed_and_taken_up_ends_in_the_same_bytes(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"model": school, "teacher": school, "tasks": guesses}
    config = on_policy_config()
    counts = distilled(distill.on_policy, config, inputs, tmp_path / "whole", runtime("whole"))
    assert counts == {"queries": 12, "rollouts": 12, "steps": 3}
    with monkeypatch.context() as patch:
        killed.at_step(patch, distill, 2)
        with pytest.raises(killed.Killed):
            distilled(distill.on_policy, config, inputs, tmp_path / "cut", runtime("cut"))
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    distilled(distill.on_policy, config, inputs, tmp_path / "cut", runtime("cut"))
    whole, cut = bytes_under(tmp_path / "whole"), bytes_under(tmp_path / "cut")
    assert whole == cut
    assert {"model.safetensors", "rollouts.jsonl", "metrics.jsonl"} <= set(whole)
    first = next(read_jsonl(tmp_path / "whole" / "metrics.jsonl", dict))
    assert abs(first["divergence"]) < 1e-5, "the student is its own teacher"
    rows = list(read_jsonl(tmp_path / "whole" / "rollouts.jsonl", dict))
    assert {row["thinking"] for row in rows} == {True, False}


def test_the_student_comes_nearer_to_the_teacher(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    """The start is the teacher with noise of a third of its weights' width on every matrix."""
    noisy, tokenizer = load_model(school), Tokenizer.load(school)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in (parameter for parameter in noisy.parameters() if parameter.dim() > 1):
            matrix += torch.randn(matrix.shape, generator=generator) * matrix.std() / 3
    save_model(noisy, tmp_path / "noisy", eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path / "noisy")
    config = on_policy_config(steps=6, prompts=6)
    inputs = {"model": tmp_path / "noisy", "teacher": school, "tasks": guesses}
    distilled(distill.on_policy, config, inputs, tmp_path / "near", runtime("near"))
    divergences = [row["divergence"] for row in read_jsonl(tmp_path / "near" / "metrics.jsonl", dict)]
    assert divergences[0] > 0.01
    assert divergences[-1] < 0.7 * divergences[0]


def test_a_student_with_experts_is_balanced_while_it_learns(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    tokenizer, student = Tokenizer.load(school), tmp_path / "sparse"
    sparse = tiny_model(vocab_size=tokenizer.vocab_size, **SPARSE)
    save_model(sparse, student, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    tokenizer.save(student)
    inputs = {"model": student, "teacher": school, "tasks": guesses}
    distilled(distill.on_policy, on_policy_config(steps=1), inputs, tmp_path / "out", runtime("out"))
    (row,) = read_jsonl(tmp_path / "out" / "metrics.jsonl", dict)
    assert row["balance"] >= 1
    assert row["expert_overload"] > 0


def test_off_policy_distillation_learns_the_teacher_s_right_replies_and_survives_a_kill(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OffPolicyConfig(
        steps=4, queries="reinforcement", num_queries=11, batch_size=4, checkpoint_every=2, rollout=ROLLOUT
    )
    inputs = {"model": school, "teacher": school, "tasks": guesses}
    counts = distilled(distill.off_policy, config, inputs, tmp_path / "whole", runtime("whole"))
    assert counts["queries"] == 11
    assert 0 < counts["examples"] < 11
    with monkeypatch.context() as patch:
        killed.at_step(patch, loop, 3)
        with pytest.raises(killed.Killed):
            distilled(distill.off_policy, config, inputs, tmp_path / "cut", runtime("cut"))
    distilled(distill.off_policy, config, inputs, tmp_path / "cut", runtime("cut"))
    assert bytes_under(tmp_path / "whole") == bytes_under(tmp_path / "cut")
