"""The trainer's log-probabilities of sampled tokens against those that the engine reported, and what equality costs.

The engine draws 10,000 tokens at temperature 1 from a model of a million parameters whose distributions are neither
flat nor certain. The trainer then computes what a policy gradient computes of these texts by the same weights, in
padded rows: with torch (`plain`), or with the engine's kernels (`exact`, pensar.infer.native.exact). `ours` is the
largest |difference| of a log-probability; `mean_difference` and `kl` are over all tokens, the KL divergence estimated
by r - 1 - log r with r the ratio of the probabilities. In bfloat16 both have weights of that type. With int8 weights
the engine draws from the rounded model, and so does an exact trainer.

The cost is that of a step of reinforcement learning with the tiny recipe's model and numbers, in CPU-seconds of one
thread: 256 replies to 32 prompts are drawn, three tenths of them teach something, in two minibatches.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import numpy as np
import torch

from benchmarks.engine_ours import runner_of
from benchmarks.engine_rollouts import CONFIG
from benchmarks.pretrain_steps import line
from pensar.base.ranks import World
from pensar.infer.engine import Completion, Engine, Request, SamplingParams
from pensar.infer.native.exact import exact
from pensar.infer.native.library import available
from pensar.infer.native.runner import Kind
from pensar.model.config import ModelConfig, replace
from pensar.model.qwen3 import Qwen3, initialize
from pensar.posttrain.grpo import GrpoConfig, micro_batches
from pensar.text.sample import Sample
from pensar.train.loss import LossConfig, Totals, batch_loss, weights_of
from pensar.train.optimizer import Optimizer
from pensar.train.step import train_step

Line = dict[str, Any]
TOKENS = 10_000
DRAWN = 80
"""Most tokens of a reply; every second ends earlier."""
TINY = ModelConfig(
    vocab_size=1_280,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=384,
    initializer_range=0.08,
    tied=True,
)
"""The model of recipes/tiny.yaml."""
REPLY = 25
LEARNED = 0.3
"""What tiny's replies take on average, and how many of them are in groups that teach (pensar.estimates)."""


def mismatch(quick: bool) -> Iterator[Line]:
    """Nothing where there are no kernels: without them there is one way to compute."""
    if not available():
        return
    kinds: tuple[Kind, ...] = ("float32", "bfloat16", "int8")
    for kind in kinds:
        model = _model(replace(CONFIG, initializer_range=0.08))
        if kind == "bfloat16":
            model.bfloat16()
        samples = _drawn(model, kind, TOKENS)
        for way in ("plain", "exact"):
            within = exact(model, kind) if way == "exact" else nullcontext()
            totals = compared(model, samples, within)
            yield line(
                f"mismatch_{way}" + ("" if kind == "float32" else f"_{kind}"),
                totals.mismatch_max,
                None,
                "none",
                "largest |difference| of a sampled token's log-probability",
                target=0.0 if way == "exact" else None,
                sign=-1,
                mean_difference=totals.mismatch / totals.pg_weight,
                kl=totals.mismatch_kl / totals.pg_weight,
                tokens=int(totals.pg_weight),
                engine_weights=kind,
            ) | {"limit": 0.0}
    yield _cost_line(rounds=3 if quick else 15)


def compared(model: Qwen3, samples: Sequence[Sample], within: AbstractContextManager[None]) -> Totals:
    """What the loss of reinforcement learning says of the samples, no weight changed."""
    batches = micro_batches(sorted(samples, key=len))
    sums = Totals.zeros(0)
    with within, torch.no_grad():
        for batch in batches:
            _, totals = batch_loss(model, batch, weights_of(batches, World()), LossConfig())
            sums = Totals.joined(sums, totals.tensor())
    return Totals.of(sums)


def _model(config: ModelConfig) -> Qwen3:
    model = Qwen3(config).eval()
    initialize(model, 0)
    return model


def _drawn(model: Qwen3, kind: Kind, tokens: int) -> list[Sample]:
    """Exactly so many sampled tokens, in replies of two lengths to prompts of many."""
    engine = Engine(runner_of(model, kind), slots=64, max_tokens_per_slot=256)
    generator = np.random.default_rng(0)
    requests: list[Request] = []
    left = tokens
    while left:
        number = len(requests)
        count = min(left, DRAWN - number % 2 * generator.integers(1, DRAWN))
        left -= count
        prompt = generator.integers(1, model.config.vocab_size, generator.integers(8, 90)).tolist()
        params = SamplingParams(
            max_tokens=int(count), temperature=1.0, seed=number, logprobs=True, ignore_eos=True
        )
        requests.append(Request(str(number), prompt, params))
    replies = engine.run(requests)
    return [_sample(request.tokens, reply, 1.0) for request, reply in zip(requests, replies, strict=True)]


def _sample(prompt: Sequence[int], reply: Completion, advantage: float) -> Sample:
    given = len(prompt)
    return Sample(
        tokens=np.asarray([*prompt, *reply.tokens], np.int32),
        pg=np.asarray([0.0] * given + [advantage] * len(reply.tokens), np.float32),
        behaviour=np.asarray([0.0] * given + reply.logprobs, np.float32),
    )


# ---------------------------------------------------------------- what it costs


def _cost_line(rounds: int) -> Line:
    """Rounds by turns, so that both ways see the machine alike; the first of each does not count."""
    with ExitStack() as stack:
        models = {name: _model(TINY) for name in ("plain", "exact")}
        stack.enter_context(exact(models["exact"]))
        ways = {name: _step_of(model) for name, model in models.items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, step in ways.items():
                seconds = step(number)
                if number:
                    found[name].append(seconds)
    whole = {name: [drawing + learning for drawing, learning in values] for name, values in found.items()}
    learning = {name: statistics.median(learning for _, learning in values) for name, values in found.items()}
    return line(
        "rl_step_exact",
        statistics.median(whole["exact"]),
        statistics.median(whole["plain"]),
        "the same step in torch",
        "CPU-seconds of a step, rollouts included",
        ratio=statistics.median(a / b for a, b in zip(whole["exact"], whole["plain"], strict=True)),
        target=1.1,
        sign=-1,
        update_seconds={name: round(value, 4) for name, value in learning.items()},
        update_ratio=round(learning["exact"] / learning["plain"], 3),
        rounds=rounds,
    )


def _step_of(model: Qwen3) -> Callable[[int], tuple[float, float]]:
    """Number of the round -> CPU-seconds of drawing, and of the updates."""
    config = GrpoConfig()
    engine = Engine(model, slots=config.prompts * config.group, max_tokens_per_slot=256)
    optimizer = Optimizer(model, config.optimizer)

    def step(number: int) -> tuple[float, float]:
        draw = np.random.default_rng(number)
        prompts = [draw.integers(1, model.config.vocab_size, 35).tolist() for _ in range(config.prompts)]
        start = time.process_time()
        engine.load(model)
        requests = [
            Request(
                f"{index}-{copy}",
                prompt,
                SamplingParams(
                    max_tokens=REPLY, temperature=1.0, seed=index * config.group + copy, logprobs=True
                ),
            )
            for index, prompt in enumerate(prompts)
            for copy in range(config.group)
        ]
        replies = engine.run(requests)
        drawn = time.process_time()
        pairs = list(zip(requests, replies, strict=True))[: int(LEARNED * len(requests))]
        samples = [_sample(r.tokens, reply, 1.0 - n % 2 * 2.0) for n, (r, reply) in enumerate(pairs)]
        for part in range(config.minibatches):
            rows = sorted(samples[part :: config.minibatches], key=len)
            train_step(model, optimizer, micro_batches(rows), 1.0, World(), config.loss)
        return drawn - start, time.process_time() - drawn

    return step
