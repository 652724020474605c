"""The engine on one GPU: first whether it is right, then how fast, each figure with its share of what memory allows.

    python -m benchmarks.engine_gpu [--quick] [--size 0.6b] [--only checks latency batches load speculation float8]
    TRITON_INTERPRET=1 python -m benchmarks.engine_gpu --device cpu

Weights are random, which changes no time but that of guesses: a random model soon repeats itself, and guesses are then
kept more often than in real text. `limit` is what reading the weights once a step, and each text's keys and values,
would allow at the vendor's bandwidth. The peer is transformers' generate as it is installed (bfloat16, sdpa, no
compiler) in the same run, in turns. Everything takes under fifteen minutes on an H100 or H200. With `--device cpu` a
tiny shape goes through the same code, with the kernels' twins where Triton is not installed: that checks the script and
measures nothing.
The exit code is 1 when a check failed or a part broke.
"""

import argparse
import datetime
import functools
import importlib.util
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, Literal

import torch

from benchmarks import engine_gpu_checks, gpu_checks
from benchmarks.engine_gpu_work import (
    Work,
    gpu_work,
    has_float8,
    kernels_of,
    model_on,
    our_seconds,
    peer_seconds,
    runner_on,
    served,
    small_work,
    step_seconds,
    warm_up,
)
from benchmarks.engine_work import prompts_of
from benchmarks.pretrain_gpu import Line, error_line, line_of, show, unfit
from pensar.infer.engine import Engine
from pensar.infer.speculate import speculation
from pensar.model.config import replace
from pensar.model.count import parameters
from pensar.model.sizes import size
from pensar.train.accelerators import ACCELERATORS
from pensar.train.speed import table_row

PEER = "transformers"
PUBLISHED = "nano-vllm's and mini-sglang's load"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", default="0.6b", help="a dense size of pensar/model/sizes.py")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options = parser.parse_args()
    reason = unfit() if options.device == "cuda" else ""
    if reason:
        show(dated(line_of("engine_gpu", reason=reason)))
        return 0
    work = small_work() if options.device == "cpu" else gpu_work(size(options.size), quick=options.quick)
    failed = False
    for name in options.only:
        try:
            for line in PARTS[name](work):
                show(dated(line))
                failed |= line.get("reached") is False and name == "checks"
        except Exception as error:  # noqa: BLE001 - the other parts are worth having
            traceback.print_exc()
            show(dated(line_of(name, reason=f"broke: {type(error).__name__}: {error}"[:300])))
            failed = True
    return int(failed)


# ---------------------------------------------------------------- what is right


def checks(work: Work) -> Iterator[Line]:
    """Every kernel against its twin in float64, and the runner against torch's and transformers' models."""
    device, on_gpu = work.device, work.device.type == "cuda"
    config = gpu_checks.small() if on_gpu else work.config
    sparse = replace(
        config,
        num_experts=8,
        experts_per_token=2,
        moe_intermediate_size=config.hidden_size // 2,
        intermediate_size=0,
    )
    sizes: dict[str, Any] = {} if on_gpu else {"width": 80, "size": 24}
    prompt: dict[str, Any] = {} if on_gpu else {"prompt": 40}
    few: dict[str, Any] = {} if on_gpu else {"prompt": 20, "new": 4}
    tested = kernels_of(device)
    own = functools.partial(runner_on, device)

    def found() -> Iterator[gpu_checks.Finding]:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield from engine_gpu_checks.kernels(device, dtype, tested, **sizes)
        for kind, shape in (("", config), ("sparse_", sparse)):
            for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
                for one in engine_gpu_checks.runners(device, shape, dtype, own, **prompt):
                    yield one._replace(name=kind + one.name)
        yield engine_gpu_checks.greedy(device, config, own, **few)
        if has_float8(device):
            small = functools.partial(runner_on, device, weights="float8")
            yield from engine_gpu_checks.float8(device, config, work.dtype, small)

    for one in found():
        yield error_line(one)


# ---------------------------------------------------------------- how fast


def latency(work: Work) -> Iterator[Line]:
    """One text at a time."""
    yield from _decoding(work, 1, "batch_1", least=1_000, ratio=20.0)


def batches(work: Work) -> Iterator[Line]:
    """Several texts at once."""
    for batch in work.batches:
        yield from _decoding(work, batch, f"batch_{batch}")


def float8(work: Work) -> Iterator[Line]:
    """One text and several with the blocks' weights in float8."""
    if not has_float8(work.device):
        yield line_of("float8", reason="this GPU has no float8 units")
        return
    for batch in (1, work.batches[-1]):
        yield from _decoding(work, batch, f"float8_batch_{batch}", weights="float8")


def load(work: Work) -> Iterator[Line]:
    """All requests at once, lengths of prompts and replies drawn evenly."""
    engine = Engine(runner_on(work.device, model_on(work)), slots=work.load.slots)
    warm_up(engine.runner, work.load.slots)
    served(engine, work.load._replace(num=min(8, work.load.num)), work.config)
    found = served(engine, work.load, work.config)
    # On average a prompt, and half of a reply as long.
    context = 1.5 * (work.load.least + work.load.most) / 2
    limit = _limit(work, "as_is", work.load.slots, context)
    yield line_of(
        "load_tokens_per_second",
        found.tokens / found.seconds,
        unit="output tokens per second",
        peer_name=PUBLISHED,
        limit=limit,
        percent=None if limit is None else 100 * found.tokens / found.seconds / limit,
        requests=work.load.num,
        prompt_tokens=found.prompt_tokens,
        output_tokens=found.tokens,
        seconds=round(found.seconds, 3),
    )
    yield line_of(
        "load_time_to_first_token",
        found.first_p50,
        unit="seconds, median, all arrive at once",
        p99=round(found.first_p99, 4),
    )
    yield line_of(
        "load_inter_token_latency_p99",
        1_000 * found.gap_p99,
        unit="milliseconds",
        p50=round(1_000 * found.gap_p50, 3),
    )


def speculate(work: Work) -> Iterator[Line]:
    """One text with guesses looked up in it, against none, on a prompt that says the same over and over."""
    model = model_on(work)
    pattern = prompts_of(5, 1, work.config, length=max(2, work.prompt // 8))[0]
    prompt = (pattern * 8)[: work.prompt]
    seconds, kept = {}, None
    for name in ("plain", "lookup"):
        guesses = speculation(model, lookup=True, slots=1) if name == "lookup" else None
        engine = Engine(runner_on(work.device, model), slots=1, speculation=guesses)
        warm_up(engine.runner, 16)
        taken = [
            our_seconds(engine, [prompt], 1 + work.decoded) - our_seconds(engine, [prompt], 1)
            for _ in range(work.rounds + 1)
        ]
        seconds[name] = statistics.median(taken[1:])
        if guesses is not None:
            kept = sum(guesses.acceptance.kept) / max(1, guesses.acceptance.passes)
    yield line_of(
        "speculation_batch_1",
        work.decoded / seconds["lookup"],
        work.decoded / seconds["plain"],
        unit="tokens per second",
        peer_name="the same without guesses",
        target=1.8,
        reached=_reached(work, seconds["plain"] / seconds["lookup"] >= 1.8),
        guesses_kept_a_pass=kept,
    )


def _decoding(
    work: Work,
    batch: int,
    name: str,
    *,
    weights: Literal["as_is", "float8"] = "as_is",
    least: float | None = None,
    ratio: float | None = None,
) -> Iterator[Line]:
    """Tokens a second after the prompt, ours and the peer's in turns: what more tokens take."""
    runner = runner_on(work.device, model_on(work), weights=weights)
    engine = Engine(runner, slots=batch)
    warm_up(runner, batch)
    ways: dict[str, Callable[[list[list[int]], int], float]] = {
        "ours": functools.partial(our_seconds, engine)
    }
    why = None
    if weights == "as_is" and importlib.util.find_spec(PEER) is None:
        why = f"{PEER} is not installed"
    elif weights == "as_is":
        ways[PEER] = peer_seconds(work)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(work.rounds + 1):
        prompts = prompts_of(number, batch, work.config, length=work.prompt)
        for way, seconds in ways.items():
            first, whole = seconds(prompts, 1), seconds(prompts, 1 + work.decoded)
            taken[way].append(whole - first)
    rates = {
        way: batch * work.decoded / max(1e-9, statistics.median(values[1:])) for way, values in taken.items()
    }
    limit = _limit(work, weights, batch, work.prompt + work.decoded / 2)
    alone = batch / step_seconds(runner, batch, work.prompt, work.decoded)
    faster = rates["ours"] / rates[PEER] if PEER in rates else None
    yield line_of(
        f"{name}_tokens_per_second",
        rates["ours"],
        rates.get(PEER),
        unit="tokens per second",
        peer_name=None if PEER not in rates else f"{PEER} {version(PEER)} generate, {work.dtype}, sdpa",
        limit=limit,
        percent=None if limit is None else 100 * rates["ours"] / limit,
        target=None if least is None else {"tokens_per_second": least, "ratio": ratio},
        reached=None
        if least is None or ratio is None
        else _reached(work, rates["ours"] >= least and (faster is None or faster >= ratio)),
        runner_alone=round(alone, 1),
        runner_alone_percent=None if limit is None else round(100 * alone / limit, 1),
        shape=_described(work, batch),
        reason=why,
    )


def _limit(work: Work, weights: str, batch: int, context: float) -> float | None:
    """Tokens a second that the bandwidth allows; None for a device that is not in the table."""
    row = table_row(torch.cuda.get_device_name(0)) if work.device.type == "cuda" else None
    if row is None:
        return None
    config, size_of = work.config, work.dtype.itemsize
    head = config.vocab_size * config.hidden_size
    blocks = parameters(config).active - head * (1 if config.tied else 2)
    read = blocks * (1 if weights == "float8" else size_of) + head * size_of
    cached = batch * context * 2 * config.num_layers * config.num_kv_heads * config.head_dim * size_of
    return batch * ACCELERATORS[row].memory_bytes_per_second / (read + cached)


def _reached(work: Work, value: bool) -> bool | None:
    """Aims are for a GPU."""
    return value if work.device.type == "cuda" else None


def _described(work: Work, batch: int) -> str:
    config = work.config
    return (
        f"{config.num_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}, {batch} x "
        f"{work.prompt} prompt tokens and {work.decoded} more"
    )


def dated(line: Line) -> Line:
    """With the day and the versions that pretrain_gpu's lines do not have."""
    triton = version("triton") if importlib.util.find_spec("triton") else "(not installed)"
    return line | {"date": datetime.date.today().isoformat(), "triton": triton}


PARTS: dict[str, Callable[[Work], Iterator[Line]]] = {
    "checks": checks,
    "latency": latency,
    "batches": batches,
    "load": load,
    "speculation": speculate,
    "float8": float8,
}


if __name__ == "__main__":
    sys.exit(main())
