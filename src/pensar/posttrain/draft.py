"""The stage that trains a draft head: the model answers queries, and the head learns to guess the answers ahead.

The model stays as it is. What the head learns is the model's distribution at every token of its replies, and the tokens
themselves, several guesses deep. Replies that it has not learned from say how many of its guesses are kept.
Shape legend: B rows, T positions, N guesses, C guesses of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.base.errors import ConfigError, ModelError
from pensar.base.files import seed_of, write_atomic
from pensar.base.metrics import Recording
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.base.stage import Counts, Runtime
from pensar.infer.engine import Engine
from pensar.infer.rollout import Rollout, RolloutConfig, roll_shared
from pensar.infer.rows import FIELDS
from pensar.infer.sampling import rules_of, sample, uniforms
from pensar.model.draft_head import WINDOW, DraftHead, initialize_head
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model
from pensar.posttrain.examples import in_batches, num_learned, path_of, queries_of
from pensar.posttrain.unrolled import Replies, unroll
from pensar.tasks.task import Task
from pensar.text.packing import Batch, one_per_row
from pensar.text.sample import Sample
from pensar.text.tokenizer import Tokenizer
from pensar.train import checkpoint
from pensar.train.guard import BadStep, refuse_not_finite
from pensar.train.head import chunk_tokens, head_loss, plain_head
from pensar.train.loop import LoopConfig, Place, loop
from pensar.train.optimizer import Optimizer
from pensar.train.schedule import rate
from pensar.train.step import reduce_gradients, share

ACCEPTANCE = "acceptance.json"
ROWS = 32
"""Held-out replies that go through the models at once."""


class DraftHeadConfig(LoopConfig, frozen=True, kw_only=True):
    """A head of one block for speculative decoding."""

    steps: int = 300
    seed: int = 1
    queries: str = "general"
    num_queries: int = 1_500
    held_out: int = 100
    """Further queries, whose replies acceptance is measured on."""
    batch_size: int = 32
    window: int = WINDOW
    """States of a reply that the head looks back on."""
    depths: int = 4
    """Guesses in a row that it is trained for."""
    decay: float = 0.8
    """Weight of a guess against the one before it, which has to be right first."""
    token_weight: float = 0.1
    """Of the cross-entropy of the reply's own tokens beside the divergence from the model's distribution."""
    measured: int = 8
    """Guesses in a row that acceptance is measured for."""
    rollout: RolloutConfig = RolloutConfig(temperature=0.6, top_p=0.95, top_k=20)

    def __post_init__(self) -> None:
        if min(self.depths, self.measured, self.held_out) < 1 or not 0 < self.decay <= 1:
            raise ConfigError(
                f"depths {self.depths}, measured {self.measured}, held_out {self.held_out} must be at least 1, decay "
                f"{self.decay} above 0 and at most 1"
            )
        if self.rollout.thinking_budget is not None:
            raise ConfigError(
                f"rollout.thinking_budget is {self.rollout.thinking_budget}: a stop sentence is nothing to be guessed; "
                "leave the budget out"
            )


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of guesses that begin at every token of the held-out replies."""

    passes: int
    tried: list[int]
    """Rows of guesses that are at least one, two, ... long before the reply ends."""
    kept: list[int]
    """Those of them whose first, first two, ... guesses are what was drawn."""
    tokens_per_pass: float
    """The kept guesses and the token that a pass draws anyway."""


def run(config: DraftHeadConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `model` and `tasks`; writes draft_head.safetensors, draft_head.json and acceptance.json."""
    place = runtime.logs, runtime.progress, runtime.recording
    return runtime.crew.call(_on_rank, config, dict(inputs), out, *place)


def _on_rank(
    world: World,
    config: DraftHeadConfig,
    inputs: dict[str, Path],
    out: Path,
    logs: Path,
    progress: Progress,
    recording: Recording,
) -> Counts:
    place = Place(out, logs, world, progress, recording=recording)
    model, tokenizer = load_model(inputs["model"]), Tokenizer.load(inputs["model"])
    model.requires_grad_(requires_grad=False)
    tasks = queries_of(inputs["tasks"], config.queries)[: config.num_queries + config.held_out]
    num = num_learned(tasks, config.held_out, path_of(inputs["tasks"], config.queries))
    seeds = [seed_of(config.seed, "draft head", i) for i in range(len(tasks))]
    rollouts = answers(model, tokenizer, tasks, seeds, config.rollout, world)
    samples = [_sample(rollout) for rollout in rollouts[:num]]
    batches_of = in_batches(samples, config.batch_size, config.seed)
    head = DraftHead(model.config, config.window)
    initialize_head(head, config.seed)
    optimizer = Optimizer(head, config.optimizer)

    def take(step: int) -> dict[str, float]:
        scale = rate(config.schedule, step, config.steps)
        values = train_step(model, head, optimizer, batches_of(step), scale, world, config)
        return values | {"lr": scale * config.optimizer.lr}

    # The loop asks of a model what every module has, and its blocks.
    loop(cast(Qwen3, head), optimizer, config, place, take, name="draft head", shown=("divergence",))
    kept = acceptance(model, head, rollouts[num:], seeds[num:], config, world)
    if world.rank == 0:
        head.save(out)
        write_atomic(out / ACCEPTANCE, msgspec.json.format(msgspec.json.encode(kept)) + b"\n")
    checkpoint.discard(out, world)
    return {"queries": num, "steps": config.steps, "tokens_per_pass": kept.tokens_per_pass}


def answers(
    model: Qwen3,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    seeds: Sequence[int],
    config: RolloutConfig,
    world: World,
) -> list[Rollout]:
    """The model's replies to the tasks, on every rank; each rank draws its share."""
    engine = Engine(model, tokenizer, slots=128)
    return roll_shared(engine, tokenizer, tasks, config, seeds, world)


def train_step(
    model: Qwen3,
    head: DraftHead,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    scale: float,
    world: World,
    config: DraftHeadConfig,
) -> dict[str, float]:
    """One update of the head by batches that are the same on every rank; returns its metrics.

    Raises BadStep, with the weights as they were, where loss or gradient is not finite.
    """
    numbers = torch.zeros(config.depths, dtype=torch.float64)
    for batch in batches:
        replies = Replies.of(batch)
        numbers += torch.stack([replies.guessed(depth).sum() for depth in range(config.depths)])
    sums = torch.zeros(config.depths, 3, dtype=torch.float64)
    for batch in batches:
        mine = share(batch, world)
        if mine is not None:
            sums += _learn(model, head, Replies.of(mine), numbers, config)
    reduce_gradients(optimizer, world)
    means = (world.all_reduce_(sums) / numbers.clamp(min=1)[:, None]).tolist()
    total = sum(weight * mean[0] for weight, mean in zip(_weights(config), means, strict=True))
    metrics = {"loss": total, "divergence": means[0][1], "likeliest_right": means[0][2]}
    metrics |= {f"divergence/{depth + 1}": mean[1] for depth, mean in enumerate(means)}
    metrics["gradient_norm"] = optimizer.clip()
    try:
        refuse_not_finite(metrics)
    except BadStep:
        optimizer.clear()
        raise
    optimizer.update(scale, world)
    return metrics | {"tokens": float(sum(batch.num_tokens for batch in batches))}


def _learn(
    model: Qwen3, head: DraftHead, replies: Replies, numbers: Tensor, config: DraftHeadConfig
) -> Tensor:
    """Backward pass of these rows' share of the loss; [depths, 3] sums of loss, divergence and right guesses."""
    hidden_BTD = replies.hidden(model)
    weights = _weights(config)
    sums = torch.zeros(config.depths, 3, dtype=torch.float64)
    losses = []
    for depth, states_BTD in enumerate(unroll(model, head, replies, hidden_BTD, config.depths)):
        rows, at = replies.guessed(depth).nonzero(as_tuple=True)
        if not len(rows):
            continue
        factor = weights[depth] / float(numbers[depth])
        loss, counted = _guess_loss(
            model,
            states_BTD[rows, at],
            hidden_BTD[rows, at + 1],
            replies.tokens_BT[rows, at + 2],
            factor,
            config,
        )
        losses.append(loss)
        sums[depth] = counted
    if losses:
        torch.stack(losses).sum().backward()
    return sums


def _weights(config: DraftHeadConfig) -> list[float]:
    """Of each depth in the loss; their sum is 1."""
    weights = [config.decay**depth for depth in range(config.depths)]
    return [weight / sum(weights) for weight in weights]


def _guess_loss(
    model: Qwen3, states_ND: Tensor, true_ND: Tensor, ids_N: Tensor, factor: float, config: DraftHeadConfig
) -> tuple[Tensor, Tensor]:
    """`factor` times the sum of KL(model || head) and the tokens' cross-entropy, and sums of what is reported."""
    weight = plain_head(model)
    if weight is None:
        raise ModelError("a draft head needs the output projection whole; open the model on every rank")
    weight_VD = weight.detach()

    def loss_of(logits_CV: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        log_q_CV = logits_CV.log_softmax(-1)
        with torch.no_grad():
            log_p_CV = F.linear(true_ND[start:stop], weight_VD).to(log_q_CV.dtype).log_softmax(-1)
            right = (logits_CV.argmax(-1) == log_p_CV.argmax(-1)).double().sum()
        divergence = F.kl_div(log_q_CV, log_p_CV, reduction="sum", log_target=True)
        surprise = -log_q_CV.gather(1, ids_N[start:stop, None]).sum()
        loss = divergence + config.token_weight * surprise
        return factor * loss, torch.stack((loss.detach().double(), divergence.detach().double(), right))

    size = config.loss.chunk_tokens or chunk_tokens(model.config.vocab_size, weight_VD.device.type)
    loss, sums = head_loss(states_ND.to(weight_VD.dtype), weight_VD, loss_of, size)
    assert sums is not None
    return loss, sums.cpu()


# ---------------------------------------------------------------- acceptance


@torch.no_grad()
def acceptance(
    model: Qwen3,
    head: DraftHead,
    rollouts: Sequence[Rollout],
    seeds: Sequence[int],
    config: DraftHeadConfig,
    world: World,
) -> Kept:
    """What an engine would keep: guesses drawn by the rollouts' rules at the uniform numbers of their tokens."""
    sums = torch.zeros(2, config.measured, dtype=torch.float64)
    mine = list(zip(rollouts, seeds, strict=True))[world.rank :: world.size]
    for start in range(0, len(mine), ROWS):
        part = mine[start : start + ROWS]
        sums += _kept([rollout for rollout, _ in part], [seed for _, seed in part], model, head, config)
    tried, kept = (row.long().tolist() for row in world.all_reduce_(sums))
    per_pass = 1 + sum(kept) / max(tried[0], 1)
    return Kept(passes=tried[0], tried=tried, kept=kept, tokens_per_pass=round(per_pass, 4))


def _kept(
    rollouts: Sequence[Rollout],
    seeds: Sequence[int],
    model: Qwen3,
    head: DraftHead,
    config: DraftHeadConfig,
) -> Tensor:
    """[2, measured] rows of guesses of each length, and those of them that are right."""
    replies = Replies.of(one_per_row([_sample(rollout) for rollout in rollouts]))
    uniform_BT = _uniforms(replies, seeds)
    hidden_BTD = replies.hidden(model)
    sums = torch.zeros(2, config.measured, dtype=torch.float64)
    going_BT = torch.ones_like(replies.tokens_BT, dtype=torch.bool)
    for depth, states_BTD in enumerate(unroll(model, head, replies, hidden_BTD, config.measured)):
        if depth:
            going_BT = F.pad(going_BT[:, :-1], (1, 0))
        guessed_BT = replies.guessed(depth)
        rows, at = guessed_BT.nonzero(as_tuple=True)
        sums[0, depth] = len(rows)
        if not len(rows):
            break
        state = np.zeros(len(rows), FIELDS)
        for field in ("temperature", "top_p", "top_k"):
            state[field] = getattr(config.rollout, field)
        logits = model.logits(states_BTD[rows, at].to(hidden_BTD.dtype))
        draw = sample(logits, rules_of(state, logits.device), uniform_BT[rows, at + 2])
        right_BT = torch.zeros_like(going_BT)
        right_BT[rows, at] = draw.ids == replies.tokens_BT[rows, at + 2]
        going_BT &= right_BT
        sums[1, depth] = going_BT.sum()
    return sums


def _uniforms(replies: Replies, seeds: Sequence[int]) -> Tensor:
    """[B, T] the number that each token of the replies was drawn with, as `roll` has it."""
    numbers_BT = F.pad(replies.entries_BT[:, :-1], (1, 0)).numpy()
    uniform_BT = np.zeros(numbers_BT.shape, np.float32)
    for row, seed in enumerate(seeds):
        for turn in range(int(numbers_BT[row].max())):
            places = np.flatnonzero(numbers_BT[row] == turn + 1)
            drawn = np.full(len(places), seed_of(seed, turn), np.uint64)
            uniform_BT[row, places] = uniforms(drawn, np.arange(len(places)))
    return torch.from_numpy(uniform_BT)


def _sample(rollout: Rollout) -> Sample:
    """A row whose `ce` stream marks what the model has said."""
    return Sample(
        tokens=np.asarray(rollout.tokens, np.int32),
        ce=np.asarray(rollout.sampled, np.float32),
        source=rollout.task.id,
    )
