"""Long-CoT cold start: a small, filtered set of reasoned replies, and a short fine-tuning on it.

The stage instils the pattern of thinking before answering and leaves room for reinforcement learning: it keeps the
number of examples and steps small, as the report advises (section 4.1).
"""

import math
import random
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pensar.base.config import Config
from pensar.base.files import read_jsonl, seed_of, write_jsonl
from pensar.base.metrics import Recording
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Counts, Runtime
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.model.weights import load_model
from pensar.posttrain.examples import Example, encode, in_batches, queries_of
from pensar.posttrain.filters import ResponseFilters, objection, several_questions, shingles
from pensar.tasks.task import Task
from pensar.text.conversation import Conversation, Message
from pensar.text.tokenizer import Tokenizer
from pensar.train.loop import LoopConfig, Place, finish, fit

SURE = 0.9
"""Probability from which a direct answer counts as known, not guessed."""


class WorkedTeacher(Config, frozen=True, kw_only=True):
    """Where candidates come from when no larger model is at hand: the tasks' own worked solutions, with the faults
    of a real teacher in these shares."""

    hasty: float = 0.5
    """Stops after the first steps and names the answer: right, but with little reasoning."""
    wrong: float = 0.08
    guess: float = 0.08
    """Right answer without a single step."""
    repeat: float = 0.05
    disagree: float = 0.05
    """Right answer after reasoning that concludes another."""
    mixed: float = 0.04


class ColdStartConfig(LoopConfig, frozen=True, kw_only=True):
    steps: int = 120
    seed: int = 1
    queries: str = "cold_start"
    candidates: int = 2
    """Replies drawn from the teacher for each query."""
    max_examples: int = 2_000
    drop_solved_directly: bool = True
    """Leave out queries that the start model answers rightly without reasoning."""
    teacher: WorkedTeacher = WorkedTeacher()
    filters: ResponseFilters = ResponseFilters()
    batch_size: int = 32


def run(config: ColdStartConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `model` and `tasks`; writes the model, examples.jsonl and dropped.jsonl with a reason for each."""
    return runtime.crew.call(
        _on_rank, config, dict(inputs), out, runtime.logs, runtime.progress, runtime.recording
    )


def _on_rank(
    world: World,
    config: ColdStartConfig,
    inputs: dict[str, Path],
    out: Path,
    logs: Path,
    progress: Progress,
    recording: Recording,
) -> Counts:
    place = Place(out, logs, world, progress, recording=recording)
    model, tokenizer = load_model(inputs["model"]), Tokenizer.load(inputs["model"])
    tasks = queries_of(inputs["tasks"], config.queries)
    solved = _solved_directly(Engine(model, tokenizer, slots=128), tokenizer, tasks, world)
    validation = list(read_jsonl(inputs["tasks"] / "validation" / "reasoning.jsonl", Task))
    examples, dropped = build(config, tasks, solved if config.drop_solved_directly else set(), validation)
    if world.rank == 0:
        write_jsonl(out / "examples.jsonl", examples)
        write_jsonl(out / "dropped.jsonl", dropped)
    batches_of = in_batches(encode(tokenizer, examples), config.batch_size, config.seed)
    fit(model, batches_of, config, place, name="cold start", seed=config.seed)
    finish(model, tokenizer, place)
    reasons = Counter(str(row["reason"]) for row in dropped)
    return {
        "queries": len(tasks),
        "examples": len(examples),
        "dropped": dict(sorted(reasons.items())),
        "steps": config.steps,
    }


def build(
    config: ColdStartConfig, tasks: list[Task], solved: set[str], validation: list[Task]
) -> tuple[list[Example], list[dict[str, object]]]:
    """Examples that pass every filter, no family with more than its share, and what was dropped with the reason."""
    shingled = [shingles(task.prompt) for task in validation]
    kept: dict[str, list[Example]] = {}
    dropped: list[dict[str, object]] = []
    for task in tasks:
        reason = "solved without reasoning" if task.id in solved else None
        if several_questions(task.prompt):
            reason = "several questions"
        if reason:
            dropped.append({"id": task.id, "prompt": task.prompt, "reason": f"query: {reason}"})
            continue
        for number in range(config.candidates):
            reply = candidate(task, config.teacher, random.Random(seed_of(config.seed, task.id, number)))
            reason = objection(task, reply, config.filters, shingled)
            if reason:
                row = {"id": task.id, "prompt": task.prompt, "reason": f"response: {reason}"}
                dropped.append({**row, "reply": msgspec.to_builtins(reply)})
                continue
            conversation = Conversation(messages=(*task.conversation().messages, reply))
            example = Example(id=task.id, conversation=conversation, kind=task.family)
            kept.setdefault(task.family, []).append(example)
            break
    share = config.max_examples // max(len(kept), 1)
    return [example for family in sorted(kept) for example in kept[family][:share]], dropped


def candidate(task: Task, teacher: WorkedTeacher, rng: random.Random) -> Message:
    """One reply of the teacher: the worked solution, perhaps with one of its faults."""
    full, answer = task.solution, task.answer
    draw = rng.random()
    for fault, share in msgspec.structs.asdict(teacher).items():
        if draw < share:
            return _faulty(task, fault, rng)
        draw -= share
    return Message(role="assistant", reasoning_content=full, content=answer)


def _faulty(task: Task, fault: str, rng: random.Random) -> Message:
    full, answer = task.solution, task.answer
    separator = ">" if ">" in full else "="
    parts = full.split(separator)
    other = rng.choice([c for c in _answers_beside(answer) if c != answer])
    reasoning, content = {
        "hasty": (hasty(full, answer), answer),
        "wrong": (separator.join([*parts[:-1], other]), other),
        "guess": ("probably", answer),
        "repeat": (f"{full} " * 4 + full, answer),
        "disagree": (separator.join([*parts[:-1], other]), answer),
        "mixed": (f"{full} ответ{separator}{answer}", answer),
    }[fault]
    return Message(role="assistant", reasoning_content=reasoning, content=content)


def _answers_beside(answer: str) -> tuple[str, ...]:
    """Answers of the same kind: the truth values, even and odd, or the digits."""
    for kind in (("T", "F"), ("even", "odd")):
        if answer in kind:
            return kind
    return tuple("0123456789")


def hasty(solution: str, answer: str) -> str:
    """The first third of the steps, at least one and each of them right, and a leap to the answer."""
    ends = [match.end() for match in re.finditer(r"=\w+", solution)]
    kept = solution[: ends[max(1, len(ends) // 3) - 1]] if ends else solution
    return f"{kept}...={answer}"


def _solved_directly(engine: Engine, tokenizer: Tokenizer, tasks: list[Task], world: World) -> set[str]:
    """Ids of the tasks whose answer the base model writes at once, and surely, when the problem stands in plain text.

    Sure is a probability above `SURE`: where there are two possible answers, half of the guesses are right.
    """
    mine = tasks[world.rank :: world.size]
    newline = tokenizer.encode("\n")
    requests = []
    for number, task in enumerate(mine):
        tokens = tokenizer.encode(f"{task.prompt}\n")
        stops = (tokenizer.eos_id, *newline)
        params = SamplingParams(max_tokens=4, temperature=0.0, stop_ids=stops, logprobs=True)
        requests.append(Request(id=str(number), tokens=tokens, params=params))
    solved = set()
    for task, completion in zip(mine, engine.run(requests), strict=True):
        words = tokenizer.decode(completion.tokens).split()
        if words[:1] == [task.answer] and completion.logprobs[0] > math.log(SURE):
            solved.add(task.id)
    return {task_id for part in world.gather(solved) for task_id in part}
