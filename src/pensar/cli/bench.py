"""`pensar bench`: how fast the engine reads prompts and writes replies of one model."""

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pensar.base.errors import ConfigError
from pensar.cli.options import Json, ModelFolder, Repeated, usable_cores
from pensar.cli.screen import Screen

if TYPE_CHECKING:
    from pensar.infer.engine import Engine

RIGHT = (0, 1, 2, 3, 4)
HEADER = ("batch", "prompt tokens", "reply tokens", "prefill tokens/s", "decode tokens/s")


def bench(
    model: ModelFolder,
    /,
    *,
    batch: Annotated[list[int] | None, Repeated] = None,
    prompt_tokens: int = 128,
    reply_tokens: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    json: Json = False,
) -> None:
    """Measure the speed of a model: prefill and decode tokens per second, medians of several repeats.

    Parameters
    ----------
    batch
        Requests at a time; may be given again (1 and 8 by default).
    prompt_tokens
        Length of each prompt, random tokens.
    reply_tokens
        Length of each reply.
    repeats
        Measurements of each batch; the median is shown.
    threads
        Threads of torch; all cores by default.
    """
    sizes = batch or [1, 8]
    threads = usable_cores() if threads is None else threads
    counts = {"batch": min(sizes), "prompt-tokens": prompt_tokens, "repeats": repeats, "threads": threads}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"--{name} is {value}; give at least 1")
    if reply_tokens < 2:
        raise ConfigError(
            f"--reply-tokens is {reply_tokens}; give at least 2, the first belongs to the prefill"
        )
    with Screen(json) as screen:
        import torch

        torch.set_num_threads(threads)
        engine, vocabulary = _open(model, max(sizes), prompt_tokens + reply_tokens)
        _measure(engine, vocabulary, 1, prompt_tokens, 2, "warm")
        results: list[dict[str, Any]] = []
        for size in sizes:
            runs = [
                _measure(engine, vocabulary, size, prompt_tokens, reply_tokens, f"{size}-{repeat}")
                for repeat in range(repeats)
            ]
            prefill, decode = (statistics.median(values) for values in zip(*runs, strict=True))
            results.append(
                {
                    "batch": size,
                    "prompt_tokens": prompt_tokens,
                    "reply_tokens": reply_tokens,
                    "prefill_tokens_per_second": prefill,
                    "decode_tokens_per_second": decode,
                }
            )
        rows = [[f"{value:,.0f}" for value in result.values()] for result in results]
        screen.table(HEADER, rows, RIGHT)
        screen.result({"model": str(model), "threads": threads, "results": results})


def _open(folder: Path, slots: int, tokens: int) -> "tuple[Engine, int]":
    from pensar.infer.engine import Engine
    from pensar.model.weights import load_model
    from pensar.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    engine = Engine(load_model(folder), tokenizer, slots=slots, max_tokens_per_slot=tokens)
    return engine, tokenizer.vocab_size


def _measure(
    engine: "Engine", vocabulary: int, batch: int, prompt: int, reply: int, name: str
) -> tuple[float, float]:
    """Prefill and decode tokens per second of one batch; what follows everybody's first token counts as decoding.

    A reply that ends early counts with the tokens that it has.
    """
    import numpy as np

    from pensar.infer.engine import Request, SamplingParams

    rng = np.random.default_rng(0)
    for index in range(batch):
        tokens = [int(token) for token in rng.integers(0, vocabulary, prompt)]
        engine.submit(Request(f"{name}-{index}", tokens, SamplingParams(max_tokens=reply)))
    begun, finished, written = set[str](), 0, 0
    start = time.perf_counter()
    first = start
    while finished < batch:
        for piece in engine.step():
            if len(begun) == batch:
                written += len(piece.tokens)
            begun.add(piece.id)
            finished += piece.finish_reason is not None
        if len(begun) == batch and first == start:
            first = time.perf_counter()
            written = 0
    end = time.perf_counter()
    return batch * prompt / (first - start), written / (end - first)
