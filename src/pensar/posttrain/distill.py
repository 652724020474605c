"""Strong-to-weak distillation: the teacher's replies first, then its distribution on the student's own replies."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from pensar.base.files import seed_of
from pensar.base.metrics import Recording
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Counts, Runtime
from pensar.infer.engine import Engine
from pensar.infer.rollout import Rollout, RolloutConfig, roll_shared
from pensar.model.weights import load_model
from pensar.posttrain.examples import Example, encode, in_batches, queries_of
from pensar.posttrain.grpo import keep_rollouts, micro_batches, truncate_rollouts
from pensar.tasks.problems import with_mode
from pensar.tasks.task import Task
from pensar.text.conversation import Conversation
from pensar.text.tokenizer import Tokenizer
from pensar.train.loop import LoopConfig, Place, finish, fit, loop
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.schedule import rate
from pensar.train.step import learning, train_step


class OffPolicyConfig(LoopConfig, frozen=True, kw_only=True):
    """Response distillation: the student learns the teacher's replies in both modes."""

    steps: int = 100
    seed: int = 1
    queries: str = "general"
    num_queries: int = 1_500
    batch_size: int = 32
    rollout: RolloutConfig = RolloutConfig(temperature=0.6, top_p=0.95, top_k=20)


class OnPolicyConfig(LoopConfig, frozen=True, kw_only=True):
    """On-policy distillation: the student samples, the teacher's distribution is the target."""

    steps: int = 40
    seed: int = 1
    queries: str = "reinforcement"
    prompts: int = 64
    """One reply for each."""
    thinking_share: float = 1.0
    """Share of prompts asked in thinking mode."""
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    """With Muon, unlike reinforcement learning: the target is dense and exact, as in fine-tuning."""


def off_policy(config: OffPolicyConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `model` (the student), `teacher` and `tasks`."""
    return runtime.crew.call(
        _off_policy, config, dict(inputs), out, runtime.logs, runtime.progress, runtime.recording
    )


def on_policy(config: OnPolicyConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `model` (the student), `teacher` and `tasks`; teacher and student share one tokenizer."""
    return runtime.crew.call(
        _on_policy, config, dict(inputs), out, runtime.logs, runtime.progress, runtime.recording
    )


def teacher_examples(
    config: OffPolicyConfig, teacher: Engine, tokenizer: Tokenizer, tasks: list[Task], world: World
) -> list[Example]:
    """The teacher's finished replies to the tasks, each a training conversation; wrong ones are left out."""
    seeds = [seed_of(config.seed, "teacher", i) for i in range(len(tasks))]
    rollouts = roll_shared(teacher, tokenizer, tasks, config.rollout, seeds, world)
    examples: list[Example] = []
    for rollout in rollouts:
        if rollout.score.value > 0:
            examples.extend(examples_of(rollout))
    return examples


def examples_of(rollout: Rollout) -> list[Example]:
    """One example for each assistant turn of a rollout, with everything before it as context."""
    task = rollout.task
    found = []
    for index, turn in enumerate(rollout.turns):
        if turn.role == "assistant":
            messages = (*task.conversation().messages, *rollout.turns[: index + 1])
            flagless = task.thinking is False and "/no_think" not in task.prompt and not task.history
            if turn.reasoning_content is not None and not turn.reasoning_content.strip():
                clean = msgspec.structs.replace(turn, reasoning_content=None)
                messages = (*messages[:-1], clean)
            conversation = Conversation(messages=messages, tools=task.tools)
            thinking = False if flagless else None
            found.append(Example(id=task.id, conversation=conversation, thinking=thinking, kind=task.family))
    return found


def _off_policy(
    world: World,
    config: OffPolicyConfig,
    inputs: dict[str, Path],
    out: Path,
    logs: Path,
    progress: Progress,
    recording: Recording,
) -> Counts:
    place = Place(out, logs, world, progress, recording=recording)
    tokenizer = Tokenizer.load(inputs["teacher"])
    teacher = Engine(load_model(inputs["teacher"]), tokenizer, slots=128)
    tasks = queries_of(inputs["tasks"], config.queries)[: config.num_queries]
    examples = teacher_examples(config, teacher, tokenizer, tasks, world)
    student = load_model(inputs["model"])
    batches_of = in_batches(encode(tokenizer, examples), config.batch_size, config.seed)
    fit(student, batches_of, config, place, name="off-policy distillation", seed=config.seed)
    finish(student, tokenizer, place)
    return {"queries": len(tasks), "examples": len(examples), "steps": config.steps}


def _on_policy(
    world: World,
    config: OnPolicyConfig,
    inputs: dict[str, Path],
    out: Path,
    logs: Path,
    progress: Progress,
    recording: Recording,
) -> Counts:
    place = Place(out, logs, world, progress, recording=recording)
    tokenizer = Tokenizer.load(inputs["model"])
    teacher, student = load_model(inputs["teacher"]), load_model(inputs["model"])
    engine = Engine(student, tokenizer, slots=max(64, config.prompts // world.size))
    queries = queries_of(inputs["tasks"], config.queries)
    optimizer = Optimizer(student, config.optimizer)

    def take(step: int) -> dict[str, float]:
        chosen = np.random.default_rng(seed_of(config.seed, "prompts", step)).permutation(len(queries))
        drawn = [int(i) for i in chosen[: config.prompts]]
        tasks = [_in_mode(queries[i], config, step, i) for i in drawn]
        seeds = [seed_of(config.seed, step, i) for i in drawn]
        engine.load(student)
        rollouts = roll_shared(engine, tokenizer, tasks, config.rollout, seeds, world)
        keep_rollouts(place, step, rollouts)
        rows = sorted((rollout.taught() for rollout in rollouts), key=len)
        scale = rate(config.schedule, step, config.steps)
        with learning(student):
            values = train_step(student, optimizer, micro_batches(rows), scale, world, config.loss, teacher)
        return values | {"reward": float(np.mean([rollout.score.value for rollout in rollouts]))}

    name, forget = "on-policy distillation", partial(truncate_rollouts, out)
    loop(student, optimizer, config, place, take, name=name, shown=("reward",), on_start=forget)
    finish(student, tokenizer, place)
    num_rollouts = config.steps * min(config.prompts, len(queries))
    return {"queries": len(queries), "rollouts": num_rollouts, "steps": config.steps}


def _in_mode(task: Task, config: OnPolicyConfig, step: int, index: int) -> Task:
    if task.thinking is not None:
        return task
    draw = seed_of(config.seed, "mode", step, index) % 1_000_000 / 1_000_000
    return with_mode(task, draw < config.thinking_share)
