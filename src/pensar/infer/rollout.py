"""Rollouts: replies of a model to tasks, with tools answered in between, scored by the tasks' verifiers.

Tokens go in and tokens come out: a reply is never decoded and encoded again on its way to the trainer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from pensar.base.config import Config
from pensar.base.errors import ModelError
from pensar.base.files import seed_of
from pensar.base.ranks import World
from pensar.infer.engine import Completion, Engine, Request, SamplingParams
from pensar.tasks.task import Task
from pensar.tasks.tools import respond
from pensar.tasks.verifiers import Score, verify
from pensar.text.chat import encode_prompt, parse_reply
from pensar.text.conversation import Conversation, Message
from pensar.text.sample import Sample
from pensar.text.tokenizer import TURN_END, Tokenizer


class RolloutConfig(Config, frozen=True, kw_only=True):
    """How replies are drawn."""

    max_tokens: int = 96
    """Limit for each assistant turn."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Reinforcement learning needs 1: a cut distribution is not the one whose probabilities the trainer computes."""
    top_k: int = 0
    thinking_budget: int | None = None
    """Reasoning tokens after which the answer is asked for."""
    adaptive_budget: float = 0.0
    """A budget that suffices for this share of questions like each one; for an engine that has learned budgets."""
    max_calls: int = 2
    """Tool calls answered before the conversation is stopped."""


@dataclass
class Rollout:
    """One reply as tokens: which were sampled, and how likely they were."""

    task: Task
    tokens: list[int]
    sampled: list[bool]
    logprobs: list[float]
    turns: list[Message] = field(default_factory=list)
    reasoning: list[int] = field(default_factory=list)
    """Reasoning tokens of each of the assistant's turns, without a stop sentence."""
    stopped: bool = False
    """A thinking budget was spent, and a stop sentence put in."""
    finish: str = ""
    score: Score = Score(0.0)

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled)

    def sample(self, advantage: float) -> Sample:
        """The training row of the policy gradient."""
        mask = np.asarray(self.sampled, np.float32)
        return Sample(
            tokens=np.asarray(self.tokens, np.int32),
            pg=mask * np.float32(advantage),
            behaviour=np.asarray(self.logprobs, np.float32),
            source=self.task.id,
        )

    def taught(self) -> Sample:
        """The training row of on-policy distillation: the teacher's distribution at every sampled token."""
        return Sample(
            tokens=np.asarray(self.tokens, np.int32),
            kl=np.asarray(self.sampled, np.float32),
            source=self.task.id,
        )

    def record(self) -> dict[str, object]:
        """What is kept on disk of every rollout."""
        return {
            "task": self.task.id,
            "prompt": self.task.prompt,
            "thinking": self.task.thinking,
            "turns": msgspec.to_builtins(self.turns),
            "score": self.score.value,
            "reason": self.score.reason,
            "finish": self.finish,
            "tokens": self.num_sampled,
        }


def prompt_mode(task: Task) -> bool | None:
    """False, which gives the empty thinking block, only where the task wants no thinking and no flag says so."""
    flagged = any("/no_think" in text for text in (task.prompt, *(m.content for m in task.history)))
    return False if task.thinking is False and not flagged else None


def unmoded(rollout: Rollout) -> Score:
    """The score of the answer alone, where a budget may have left no thinking though it was asked for."""
    if rollout.finish != "stop":
        return rollout.score
    return verify(msgspec.structs.replace(rollout.task, thinking=None), rollout.turns)


def roll_shared(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    config: RolloutConfig,
    seeds: Sequence[int],
    world: World,
    *,
    together: int = 1,
) -> list[Rollout]:
    """`roll` of all tasks on every rank, in order; ranks draw in turn, `together` tasks in a row each time.

    Tasks that begin alike are best drawn together: the engine computes what they share once.
    """
    firsts = range(0, len(tasks), together)[world.rank :: world.size]
    mine = [i for first in firsts for i in range(first, min(first + together, len(tasks)))]
    rolled = roll(engine, tokenizer, [tasks[i] for i in mine], config, [seeds[i] for i in mine])
    parts = world.dealt([rolled[start : start + together] for start in range(0, len(rolled), together)])
    return [rollout for part in parts for rollout in part]


def roll(
    engine: Engine, tokenizer: Tokenizer, tasks: Sequence[Task], config: RolloutConfig, seeds: Sequence[int]
) -> list[Rollout]:
    """One finished and scored rollout per task, in order; `seeds` fixes each one's draw whatever its neighbours.

    Raises ModelError for adaptive budgets of an engine without learned ones.
    """
    if config.adaptive_budget and engine.adaptive is None:
        raise ModelError(
            f"rollout.adaptive_budget is {config.adaptive_budget}, but the model has no learned thinking budgets; give "
            "thinking_budget instead"
        )
    rollouts = []
    for task in tasks:
        tokens = encode_prompt(tokenizer, task.conversation(), thinking=prompt_mode(task))
        rollouts.append(Rollout(task, tokens, [False] * len(tokens), [0.0] * len(tokens)))
    active = list(range(len(tasks)))
    for turn in range(config.max_calls + 1):
        requests = [
            Request(
                id=str(i),
                tokens=rollouts[i].tokens,
                params=SamplingParams(
                    max_tokens=config.max_tokens,
                    temperature=config.temperature,
                    top_k=config.top_k,
                    top_p=config.top_p,
                    seed=seed_of(seeds[i], turn),
                    thinking_budget=config.thinking_budget,
                    adaptive_budget=config.adaptive_budget,
                    stop_ids=(tokenizer.eos_id,),
                    logprobs=True,
                ),
            )
            for i in active
        ]
        waiting = []
        for i, completion in zip(active, engine.run(requests), strict=True):
            if _append(rollouts[i], completion, tokenizer) and turn < config.max_calls:
                waiting.append(i)
        if not waiting:
            break
        active = waiting
    for rollout in rollouts:
        if rollout.finish == "stop":
            rollout.score = verify(rollout.task, rollout.turns)
        else:
            rollout.score = Score(0.0, "unfinished")
    return rollouts


def _append(rollout: Rollout, completion: Completion, tokenizer: Tokenizer) -> bool:
    """Adds a reply; if it calls tools, adds their answers as well and returns True: the model has the word again."""
    rollout.tokens = rollout.tokens + list(completion.tokens)
    rollout.sampled = rollout.sampled + [not forced for forced in completion.forced]
    rollout.logprobs = rollout.logprobs + list(completion.logprobs)
    rollout.reasoning.append(completion.num_reasoning_tokens)
    rollout.stopped |= any(completion.forced)
    rollout.finish = completion.finish_reason
    text = tokenizer.decode([token for token in completion.tokens if token != tokenizer.eos_id])
    reply = parse_reply(text)
    rollout.turns.append(reply)
    if not reply.tool_calls or completion.finish_reason != "stop":
        return False
    results = [respond(rollout.task, call.name, call.arguments) for call in reply.tool_calls]
    answers = [Message(role="tool", content=result) for result in results]
    rollout.turns.extend(answers)
    tail = tool_turn(tokenizer, answers, thinking=prompt_mode(rollout.task))
    rollout.tokens += tail
    rollout.sampled += [False] * len(tail)
    rollout.logprobs += [0.0] * len(tail)
    return True


def tool_turn(tokenizer: Tokenizer, answers: Sequence[Message], *, thinking: bool | None = None) -> list[int]:
    """The tokens between a reply's `<|im_end|>` and the next reply: the tools' answers and the opened turn.

    `thinking=False` gives the empty thinking block, as it did before the first reply.
    """
    before = (Message(role="user", content="?"), Message(role="assistant", content="!"))
    tokens = encode_prompt(tokenizer, Conversation(messages=(*before, *answers)), thinking=thinking)
    ends = [index for index, token in enumerate(tokens) if token == tokenizer.special(TURN_END)]
    return tokens[ends[-2] + 1 :]
