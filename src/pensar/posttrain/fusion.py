"""Thinking-mode fusion: one model that thinks or answers at once, as the flags in the conversation ask.

Thinking data is the reasoning model's own, kept where it is right; non-thinking data is curated over reasoning,
forms and tools. Flags stand in prompts of one and of several turns, and the last one counts (report, section 4.3).
"""

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pensar.base.config import Config
from pensar.base.files import read_jsonl, seed_of, write_jsonl
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Counts, Runtime
from pensar.infer.engine import Engine
from pensar.infer.rollout import RolloutConfig, roll
from pensar.model.weights import load_model, save_model
from pensar.posttrain.examples import Example, encode, in_batches
from pensar.tasks.instructions import instruction
from pensar.tasks.modes import flagged, with_history
from pensar.tasks.problems import ATTEMPTS, held_out, statement, with_mode
from pensar.tasks.task import Task
from pensar.tasks.tools import tool_task
from pensar.tasks.verifiers import gold
from pensar.text.conversation import Conversation, Message
from pensar.text.tokenizer import Tokenizer
from pensar.train import checkpoint
from pensar.train.loop import LoopConfig, Place, fit


class Shares(Config, frozen=True, kw_only=True):
    """How many examples of each kind are built."""

    thinking: int = 1_500
    """Queries put to the reasoning model; wrong replies are dropped."""
    direct: int = 1_500
    instructions: int = 300
    tools: int = 300
    history: float = 0.25
    """Share of the reasoning examples that get earlier turns with flags of their own."""


class FusionConfig(LoopConfig, frozen=True, kw_only=True):
    steps: int = 150
    seed: int = 1
    queries: str = "cold_start"
    shares: Shares = Shares()
    rollout: RolloutConfig = RolloutConfig(temperature=0.6, top_p=0.95, top_k=20)
    batch_size: int = 32


def run(config: FusionConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `model` (the reasoning model) and `tasks`; writes the fused model and examples.jsonl."""
    return runtime.crew.call(_on_rank, config, dict(inputs), out, runtime.logs, runtime.progress)


def _on_rank(
    world: World, config: FusionConfig, inputs: dict[str, Path], out: Path, logs: Path, progress: Progress
) -> Counts:
    model, tokenizer = load_model(inputs["model"]), Tokenizer.load(inputs["model"])
    tasks = list(read_jsonl(inputs["tasks"] / "train" / f"{config.queries}.jsonl", Task))
    engine = Engine(model, tokenizer, slots=128)
    thinking = sampled_thinking(config, tasks, engine, tokenizer, world)
    examples = [
        *thinking,
        *direct_examples(config, tasks),
        *curated_examples(config, held_out(inputs["tasks"])),
    ]
    if world.rank == 0:
        write_jsonl(out / "examples.jsonl", examples)
    batches_of = in_batches(encode(tokenizer, examples), config.batch_size, config.seed)
    fit(model, batches_of, config, Place(out, logs, world, progress), name="thinking-mode fusion")
    checkpoint.discard(out, world)
    if world.rank == 0:
        save_model(model, out, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        tokenizer.save(out)
    kinds = Counter(example.kind for example in examples)
    num_asked = min(config.shares.thinking, len(tasks))
    return {
        "examples": len(examples),
        "kinds": dict(sorted(kinds.items())),
        "rejected": num_asked - len(thinking),
        "steps": config.steps,
    }


def sampled_thinking(
    config: FusionConfig, tasks: list[Task], engine: Engine, tokenizer: Tokenizer, world: World
) -> list[Example]:
    """The model's own right replies, put under prompts with flags."""
    asked = tasks[: config.shares.thinking]
    mine = range(len(asked))[world.rank :: world.size]
    seeds = [seed_of(config.seed, "thinking", i) for i in mine]
    rollouts = roll(engine, tokenizer, [with_mode(asked[i], True) for i in mine], config.rollout, seeds)
    found = [(i, r.turns) for i, r in zip(mine, rollouts, strict=True) if r.score.value == 1]
    pairs = sorted((pair for part in world.gather(found) for pair in part), key=lambda pair: pair[0])
    return [_example(config, asked[i], True, tuple(turns), "thinking") for i, turns in pairs]


def direct_examples(config: FusionConfig, tasks: list[Task]) -> list[Example]:
    """Reasoning problems answered at once."""
    chosen = tasks[max(0, len(tasks) - config.shares.direct) :]
    return [_example(config, task, False, gold(task, thinking=False), "direct") for task in chosen]


def curated_examples(config: FusionConfig, barred: set[str]) -> list[Example]:
    """Forms and tools in both modes, without the `barred` problems."""
    examples: list[Example] = []
    for kind, num, make in (
        ("instructions", config.shares.instructions, instruction),
        ("tools", config.shares.tools, tool_task),
    ):
        for index in range(num):
            rng = random.Random(seed_of(config.seed, kind, index))
            drawn = next((task for _ in range(ATTEMPTS) if statement(task := make(rng)) not in barred), None)
            if drawn is not None:
                task = flagged(drawn, rng.random() < 0.5, rng)
                examples.extend(_turn_examples(task, gold(task), kind))
    return examples


def _example(
    config: FusionConfig, task: Task, thinking: bool, turns: tuple[Message, ...], kind: str
) -> Example:
    """The reply under a flagged prompt, at times after earlier turns."""
    rng = random.Random(seed_of(config.seed, kind, task.id))
    asked = flagged(task, thinking, rng)
    has_flag = asked.prompt != task.prompt
    if has_flag and rng.random() < config.shares.history:
        asked = with_history(asked, rng, rng.randint(1, 2))
    return _turn_examples(asked, turns, kind)[-1]


def _turn_examples(task: Task, turns: tuple[Message, ...], kind: str) -> list[Example]:
    """One example for each assistant turn."""
    messages = task.conversation().messages
    return [
        Example(
            id=task.id,
            conversation=Conversation(messages=(*messages, *turns[: index + 1]), tools=task.tools),
            kind=kind,
        )
        for index, turn in enumerate(turns)
        if turn.role == "assistant"
    ]
