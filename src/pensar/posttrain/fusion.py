"""Thinking-mode fusion: one model that thinks or answers at once, as the flags in the conversation ask.

Thinking data is the reasoning model's own, kept where it is right; non-thinking data is curated over reasoning,
forms and tools. Flags stand in prompts of one and of several turns, and the last one counts (report, section 4.3).
"""

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pensar.base.config import Config
from pensar.base.files import seed_of, write_jsonl
from pensar.base.metrics import Recording
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Counts, Runtime
from pensar.infer.engine import Engine
from pensar.infer.rollout import Rollout, RolloutConfig, roll
from pensar.model.weights import load_model
from pensar.posttrain.examples import Example, encode, in_batches, queries_of
from pensar.tasks.instructions import instruction
from pensar.tasks.modes import flagged, with_history
from pensar.tasks.problems import ATTEMPTS, held_out, statement, with_mode
from pensar.tasks.task import Task
from pensar.tasks.tools import tool_task
from pensar.tasks.verifiers import gold
from pensar.text.chat import encode_stop_sentence
from pensar.text.conversation import Conversation, Message
from pensar.text.sample import Sample
from pensar.text.tokenizer import THINK, THINK_END, Tokenizer
from pensar.train.loop import LoopConfig, Place, finish, fit


class Shares(Config, frozen=True, kw_only=True):
    """How many examples of each kind are built."""

    thinking: int = 1_500
    """Queries put to the reasoning model; wrong replies are dropped."""
    direct: int = 1_500
    """Problems answered at once, of at most `direct_steps`: what is too long for a glance would teach to guess."""
    direct_steps: int = 6
    interrupted: int = 400
    """Of the thinking replies, so many also come with their reasoning cut short, to be answered all the same."""
    instructions: int = 900
    tools: int = 900
    history: float = 0.4
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
    return runtime.crew.call(
        _on_rank, config, dict(inputs), out, runtime.logs, runtime.progress, runtime.recording
    )


def _on_rank(
    world: World,
    config: FusionConfig,
    inputs: dict[str, Path],
    out: Path,
    logs: Path,
    progress: Progress,
    recording: Recording,
) -> Counts:
    place = Place(out, logs, world, progress, recording=recording)
    model, tokenizer = load_model(inputs["model"]), Tokenizer.load(inputs["model"])
    tasks = queries_of(inputs["tasks"], config.queries)
    engine = Engine(model, tokenizer, slots=128)
    asked = tasks[: config.shares.thinking]
    thinking = sampled_thinking(config, asked, engine, tokenizer, world)
    examples = [
        *(_example(config, asked[i], True, tuple(rollout.turns), "thinking") for i, rollout in thinking),
        *direct_examples(config, tasks),
        *curated_examples(config, held_out(inputs["tasks"])),
    ]
    tried = [
        interrupted(tokenizer, rollout, random.Random(seed_of(config.seed, "interrupted", rollout.task.id)))
        for _, rollout in thinking[: config.shares.interrupted]
    ]
    cut = [sample for sample in tried if sample is not None]
    if world.rank == 0:
        write_jsonl(out / "examples.jsonl", examples)
        write_jsonl(out / "interrupted.jsonl", [{"text": tokenizer.decode(list(s.tokens))} for s in cut])
    batches_of = in_batches([*encode(tokenizer, examples), *cut], config.batch_size, config.seed)
    fit(model, batches_of, config, place, name="thinking-mode fusion", seed=config.seed)
    finish(model, tokenizer, place)
    kinds = Counter([*(example.kind for example in examples), *("interrupted" for _ in cut)])
    return {
        "examples": len(examples) + len(cut),
        "kinds": dict(sorted(kinds.items())),
        "rejected": len(asked) - len(thinking),
        "steps": config.steps,
    }


def sampled_thinking(
    config: FusionConfig, asked: list[Task], engine: Engine, tokenizer: Tokenizer, world: World
) -> list[tuple[int, Rollout]]:
    """The model's own right replies, each with the index of its task."""
    mine = range(len(asked))[world.rank :: world.size]
    seeds = [seed_of(config.seed, "thinking", i) for i in mine]
    rollouts = roll(engine, tokenizer, [with_mode(asked[i], True) for i in mine], config.rollout, seeds)
    found = [pair for pair in zip(mine, rollouts, strict=True) if pair[1].score.value == 1]
    return sorted((pair for part in world.gather(found) for pair in part), key=lambda pair: pair[0])


def interrupted(tokenizer: Tokenizer, rollout: Rollout, rng: random.Random) -> Sample | None:
    """The reply with its reasoning cut somewhere by the stop sentence, as a thinking budget cuts it; the answer alone
    is learned. None where the reply does not go on after its reasoning as the stop sentence does.

    The report (section 4.3) finds that answering from partial reasoning emerges from the two modes by itself. In a
    model of half a million parameters it does not: the sentence is foreign to it.
    """
    open_at, close_at = (rollout.tokens.index(tokenizer.special(mark)) for mark in (THINK, THINK_END))
    kept = rollout.tokens[: open_at + 1 + rng.randrange(close_at - open_at - 1)]
    stop = encode_stop_sentence(tokenizer)
    blanks = len(stop) - 1 - stop.index(tokenizer.special(THINK_END))
    if list(rollout.tokens[close_at + 1 : close_at + 1 + blanks]) != list(stop[len(stop) - blanks :]):
        return None
    answer = rollout.tokens[close_at + 1 + blanks :]
    tokens = np.asarray([*kept, *stop, *answer], np.int32)
    learned = np.zeros(len(tokens), np.float32)
    learned[len(tokens) - len(answer) :] = 1
    return Sample(tokens=tokens, ce=learned, source=rollout.task.id)


def direct_examples(config: FusionConfig, tasks: list[Task]) -> list[Example]:
    """Short reasoning problems answered at once."""
    short = [task for task in tasks if task.difficulty <= config.shares.direct_steps]
    chosen = short[max(0, len(short) - config.shares.direct) :]
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
            drawn = next(
                (task for _ in range(ATTEMPTS) if statement(task := make(rng, "train")) not in barred), None
            )
            if drawn is not None:
                task = flagged(drawn, rng.random() < 0.5, rng)
                examples.extend(_turn_examples(task, gold(task), kind))
    return examples


def _example(
    config: FusionConfig, task: Task, thinking: bool, turns: tuple[Message, ...], kind: str
) -> Example:
    """The reply under a flagged prompt, at times after earlier turns."""
    rng = random.Random(seed_of(config.seed, kind, task.id))
    if rng.random() < config.shares.history:
        asked = with_history(task, thinking, rng, rng.randint(1, 2))
    else:
        asked = flagged(task, thinking, rng)
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
