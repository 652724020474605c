"""Rollouts of reinforcement learning: our engine against the calls that TRL's GRPOTrainer makes without vLLM.

TRL 1.16, trainer/grpo_trainer.py: `_generate_single_turn` pads the prompts on the left and calls transformers'
`generate` with do_sample at temperature 1, top_p 1 and top_k 0 (its defaults) and masks what follows a stop token;
`_get_per_token_logps_and_entropies` then computes log-probabilities by a forward pass over prompts and completions,
`per_device_train_batch_size` rows (8 by default) at a time. These calls are made here as they are there, with no
trainer around them. Ours reports the log-probabilities of what it has drawn, so there is no second pass.

The model has a million parameters; 8 prompts of 24 to 32 tokens get 8 completions each. They end after 128 tokens, or,
in the second line, at any of 41 stop tokens of the 2,048, which is after about 50 tokens on average.
"""

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import engine_ours
from benchmarks.engine_work import num_weights, operations_per_second
from benchmarks.pretrain_steps import line, peer_is_here, peer_name
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import save_model

Line = dict[str, Any]
CONFIG = ModelConfig(
    vocab_size=2_048,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=384,
    tied=True,
)
NUM_PROMPTS, GROUP = 8, 8
NEW_TOKENS = 128
ROWS_PER_PASS = 8
PAD = 0
STOPS = {"": (), "_of_varied_length": tuple(range(1, 42))}

Rollout = Callable[[int], tuple[int, float]]
"""Number of the round -> (tokens of all completions, the sum of their log-probabilities)."""


def rollouts(quick: bool) -> Iterator[Line]:
    for ending, stops in STOPS.items():
        starts: dict[str, Callable[[], Rollout]] = {
            kind: partial(_engine, kind, stops) for kind in engine_ours.kinds() if kind != "int4"
        }
        if peer_is_here():
            starts["peer"] = partial(_trl, stops)
        with ExitStack() as stack:
            contenders = {name: stack.enter_context(_apart(start)) for name, start in starts.items()}
            speeds = _interleaved(contenders, rounds=3 if quick else 9)
        theirs = speeds.get("peer")
        for kind in (name for name in speeds if name != "peer"):
            limit = operations_per_second(kind) / (2 * num_weights(CONFIG))
            ratio = None
            if theirs is not None:
                ratio = statistics.median(a / b for a, b in zip(speeds[kind], theirs, strict=True))
            yield line(
                engine_ours.named(f"rollouts{ending}_vs_trl", kind, "float32"),
                statistics.median(speeds[kind]),
                None if theirs is None else statistics.median(theirs),
                peer_name("generate on left-padded prompts and a second pass, as TRL 1.16 calls them"),
                "tokens per CPU-second, log-probabilities included",
                ratio=ratio,
                target=None if ratio is None else 4.0,
                limit=limit,
                ours_kind=kind,
                batch=NUM_PROMPTS * GROUP,
            )


def _prompts(number: int) -> list[list[int]]:
    draw = np.random.default_rng(number)
    lengths = draw.integers(24, 33, NUM_PROMPTS)
    return [draw.integers(64, CONFIG.vocab_size, length).tolist() for length in lengths]


def _model() -> Qwen3:
    model = Qwen3(CONFIG).eval()
    initialize(model, 0)
    return model


def _engine(kind: str, stops: tuple[int, ...]) -> Rollout:
    engine = Engine(
        engine_ours.runner_of(_model(), kind), slots=NUM_PROMPTS * GROUP, max_tokens_per_slot=32 + NEW_TOKENS
    )

    def roll(number: int) -> tuple[int, float]:
        params = partial(
            SamplingParams, max_tokens=NEW_TOKENS, temperature=1.0, logprobs=True, stop_ids=stops
        )
        requests = [
            Request(f"{index}-{copy}", prompt, params(seed=(number * 64 + index) * GROUP + copy))
            for index, prompt in enumerate(_prompts(number))
            for copy in range(GROUP)
        ]
        done = engine.run(requests)
        return sum(len(one.tokens) for one in done), sum(sum(one.logprobs) for one in done)

    return roll


def _trl(stops: tuple[int, ...]) -> Rollout:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        save_model(_model(), Path(folder))
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        pad_token_id=PAD,
        eos_token_id=list(stops) or None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        disable_compile=True,
    )
    peer.generation_config = config
    stop_ids = torch.tensor(stops, dtype=torch.int64)

    def roll(number: int) -> tuple[int, float]:
        prompts = [torch.tensor(prompt) for prompt in _prompts(number) for _ in range(GROUP)]
        ids, mask = _padded(prompts)
        with torch.no_grad():
            whole = peer.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            completions = whole[:, ids.shape[1] :]
            kept = _up_to_the_stop(completions, stop_ids)
            logprobs = _logprobs(peer, whole, torch.cat((mask, kept), 1), completions.shape[1])
        return int(kept.sum()), float((logprobs * kept).sum())

    return roll


def _padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Padded on the left, with the mask."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _up_to_the_stop(completions: Tensor, stop_ids: Tensor) -> Tensor:
    """1 up to the first stop token, 0 after it."""
    is_end = torch.isin(completions, stop_ids)
    last = torch.full((len(completions),), completions.shape[1])
    last[is_end.any(1)] = is_end.int().argmax(1)[is_end.any(1)]
    return (torch.arange(completions.shape[1])[None] <= last[:, None]).int()


def _logprobs(peer: Any, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    parts = []
    for start in range(0, len(ids), ROWS_PER_PASS):
        rows = slice(start, start + ROWS_PER_PASS)
        logits = peer(input_ids=ids[rows], attention_mask=mask[rows], logits_to_keep=keep + 1).logits[:, :-1]
        chosen = logits.gather(-1, ids[rows, -keep:, None])[..., 0]
        parts.append(chosen - logits.logsumexp(-1))
    return torch.cat(parts)


@contextmanager
def _apart(start: Callable[[], Rollout]) -> Iterator[Callable[[int], float]]:
    """A process of its own: number of the round -> tokens per CPU-second."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(start, there), daemon=True)
    process.start()
    there.close()

    def speed(number: int) -> float:
        here.send(number)
        tokens, logprobs, seconds = here.recv()
        # A random model is nearly uniform: both sides must report about log(1 / vocabulary) for a token.
        assert abs(logprobs / tokens + math.log(CONFIG.vocab_size)) < 0.1, logprobs / tokens
        return float(tokens / seconds)

    try:
        yield speed
        here.send(None)
    finally:
        here.close()
        process.join()


def _serve(start: Callable[[], Rollout], asked: Connection) -> None:
    torch.set_num_threads(1)
    roll = start()
    while (number := asked.recv()) is not None:
        begin = time.process_time()
        tokens, logprobs = roll(number)
        asked.send((tokens, logprobs, time.process_time() - begin))


def _interleaved(contenders: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Tokens per CPU-second of each in every round, after one that does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, speed in contenders.items():
            found = speed(number)
            if number:
                speeds[name].append(found)
    return speeds
