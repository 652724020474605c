"""Pre-training against transformers on one thread: speed, memory, what is learned, loading, and the balance gradient.

    python -m benchmarks.pretrain [--quick] [--only NAME ...]

Times are CPU-seconds of interleaved rounds (ours, theirs, ours, theirs), each contender in a process of its own. `ours`
and `peer` are medians; the ratio of two speeds is the median over the rounds, since what slows a round down slows both.
The limit of a speed is what matrix products alone would allow: the model's floating-point operations at the rate of
1,024 x 1,024 products in the same rounds. `target` is for the ratio where there is one, else for `ours`, and `reached`
says whether it is met.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import pretrain_balance, pretrain_learning, pretrain_parity
from benchmarks.pretrain_loading import load_lines
from benchmarks.pretrain_memory import in_fresh_process
from benchmarks.pretrain_steps import (
    CONTEXT,
    DENSE,
    ROWS,
    SPARSE,
    apart,
    interleaved,
    line,
    our_step,
    paired,
    peer_is_here,
    peer_model,
    peer_name,
    peer_step,
    products,
    random_tokens,
    started,
    timed,
)
from pensar.model.config import ModelConfig
from pensar.model.count import flops_per_token
from pensar.train.arithmetic import WORTH, bfloat16_gain

Line = dict[str, Any]
SPEED = "tokens per CPU-second"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, steps and tokens")
    parser.add_argument("--only", nargs="+", choices=list(METRICS), default=list(METRICS), metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        for found in METRICS[name](options.quick):
            print(json.dumps(found), flush=True)


def dense(quick: bool) -> Iterator[Line]:
    contenders = {"ours": partial(_ours, DENSE)}
    if peer_is_here():
        contenders["peer"] = partial(_theirs, DENSE, compiling=True)
    yield from _speeds(
        DENSE, contenders, {"peer": ("dense_vs_transformers", "compiled, fused AdamW", 1.15)}, quick
    )


def moe(quick: bool) -> Iterator[Line]:
    """The peer without its balance loss, ours with it."""
    contenders: dict[str, Callable[..., Any]] = {"ours": partial(_ours, SPARSE)}
    if peer_is_here():
        contenders["eager"] = partial(_theirs, SPARSE, compiling=False, experts="eager")
        contenders["grouped"] = partial(_theirs, SPARSE, compiling=True, experts="grouped_mm")
    named = {
        "eager": ("moe_vs_transformers_eager", "experts one by one, fused AdamW", 2.4),
        "grouped": ("moe_vs_transformers_grouped", "grouped_mm, compiled, fused AdamW", 1.05),
    }
    yield from _speeds(SPARSE, contenders, named, quick)


def bfloat16(quick: bool) -> Iterator[Line]:
    """The dense model with products in bfloat16 on both sides, where the probe of a training stage would take them."""
    if bfloat16_gain() < WORTH:
        return
    within = partial(torch.autocast, "cpu", torch.bfloat16)
    contenders = {"ours": partial(_ours, DENSE, within=within)}
    if peer_is_here():
        contenders["peer"] = partial(_theirs, DENSE, compiling=True, within=within)
    named = {"peer": ("dense_vs_transformers_bfloat16", "compiled, autocast, fused AdamW", None)}
    yield from _speeds(DENSE, contenders, named, quick, torch.bfloat16)


def _ours(
    config: ModelConfig,
    stack: ExitStack,
    *,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[], float]:
    return our_step(started(config), random_tokens(config), stack, within=within)


def _theirs(
    config: ModelConfig,
    stack: ExitStack,
    *,
    compiling: bool,
    experts: str = "",
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[], float]:
    more = {"experts_implementation": experts} if experts else {}
    model = peer_model(config, **more)
    return peer_step(model, random_tokens(config), compiling=compiling, within=within)


def _speeds(
    config: ModelConfig,
    contenders: Mapping[str, Callable[[ExitStack], Callable[[], float]]],
    named: Mapping[str, tuple[str, str, float | None]],
    quick: bool,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Line]:
    """A line for each peer of `named`: peer -> metric, what it is, target of the ratio."""
    with ExitStack() as stack:
        running = {name: stack.enter_context(apart(start)) for name, start in contenders.items()}
        multiply, operations = products(dtype=dtype)
        seconds = interleaved(running | {"products": timed(multiply)}, rounds=3 if quick else 15)
    limit = operations / statistics.median(seconds["products"]) / flops_per_token(config, CONTEXT)
    speed = {
        name: ROWS * CONTEXT / statistics.median(spent)
        for name, spent in seconds.items()
        if name != "products"
    }
    for peer, (metric, kind, target) in named.items():
        known = peer in seconds
        yield line(
            metric,
            speed["ours"],
            speed.get(peer),
            peer_name(kind),
            SPEED,
            ratio=paired(seconds["ours"], seconds[peer]) if known else None,
            target=target if known else None,
            limit=limit,
            best={name: round(ROWS * CONTEXT / min(seconds[name])) for name in speed},
        )


def memory(quick: bool) -> Iterator[Line]:
    """Peaks of a step above what stays between steps, each in a fresh process."""
    kinds = {"dense": 1.0, "vocabulary": 3.0} if quick else {"dense": 1.0, "moe": 1.0, "vocabulary": 3.0}
    for kind, target in kinds.items():
        peaks = {
            side: in_fresh_process(f"step_peak({side!r}, {kind!r}, {not quick})")
            for side in (("ours", "peer") if peer_is_here() else ("ours",))
        }
        peer = peaks.get("peer")
        yield line(
            f"step_memory_{kind}",
            peaks["ours"] / 2**20,
            None if peer is None else peer / 2**20,
            peer_name("as in the speed of the same model" if not quick else "not compiled"),
            "MiB above weights and optimiser state",
            ratio=None if peer is None else peer / peaks["ours"],
            target=None if peer is None else target,
        )


def muon(quick: bool) -> Iterator[Line]:
    tokens, windows = (120_000, 32) if quick else (1_024_000, 256)
    rates = pretrain_learning.ADAMW_RATES
    ours, adamw = pretrain_learning.muon_and_adamw(tokens, windows, rates)
    best = min(adamw.values())
    yield line(
        "muon_vs_adamw",
        ours,
        best,
        f"AdamW, best of the rates {', '.join(map(str, rates))}",
        "bits per byte",
        tokens=tokens,
        difference=round(best - ours, 4),
        adamw={str(lr): round(value, 4) for lr, value in adamw.items()},
    ) | {"target": 0.3, "reached": best - ours >= 0.3}


def balance(quick: bool) -> Iterator[Line]:
    errors = pretrain_balance.errors()
    for peer in ("micro-batch", "running average"):
        yield line(
            f"balance_gradient_error_vs_{peer.replace(' ', '_')}",
            errors["ours"],
            errors[peer],
            f"shares of experts by {peer}",
            "of the whole batch's router gradient; 2 ranks, 4 micro-batches",
        ) | {"target": 1e-6, "reached": errors["ours"] <= 1e-6}


def loading(quick: bool) -> Iterator[Line]:
    with tempfile.TemporaryDirectory() as folder:
        yield from load_lines(Path(folder), quick)


METRICS: Mapping[str, Callable[[bool], Iterator[Line]]] = {
    "dense": dense,
    "moe": moe,
    "bfloat16": bfloat16,
    "memory": memory,
    "muon": muon,
    "loading": loading,
    "parity": pretrain_parity.lines,
    "balance": balance,
}


if __name__ == "__main__":
    main()
