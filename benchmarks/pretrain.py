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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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


FLOAT32, BFLOAT16 = "float32", "bfloat16"
WITHIN: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
    FLOAT32: nullcontext,
    BFLOAT16: partial(torch.autocast, "cpu", torch.bfloat16),
}
Start = Callable[[ExitStack], Callable[[], float]]


class Match(NamedTuple):
    """Ours against a peer, each in the faster of the given types of products."""

    metric: str
    peer: str
    types: Sequence[str]
    target: float | None = None


def dense(quick: bool) -> Iterator[Line]:
    yield from _speeds(
        DENSE, {"compiled": True}, [Match("dense_vs_transformers", "compiled", [FLOAT32], 1.15)], quick
    )


def moe(quick: bool) -> Iterator[Line]:
    """The peer without its balance loss, ours with it; in the types that a training stage might choose here."""
    found = types()
    matches = [
        Match("moe_vs_transformers_eager", "experts one by one", found, 2.4),
        Match("moe_vs_transformers_grouped", "grouped_mm, compiled", found, 1.05),
    ]
    if len(found) > 1:
        matches += [
            Match(f"{match.metric}_{name}", match.peer, [name]) for match in matches for name in found
        ]
    yield from _speeds(SPARSE, {"experts one by one": False, "grouped_mm, compiled": True}, matches, quick)


def bfloat16(quick: bool) -> Iterator[Line]:
    """The dense model with products in bfloat16 on both sides, where a training stage would take them."""
    if BFLOAT16 in types():
        matches = [Match("dense_vs_transformers_bfloat16", "compiled", [BFLOAT16])]
        yield from _speeds(DENSE, {"compiled": True}, matches, quick)


def types() -> list[str]:
    """float32, and bfloat16 where the probe of a training stage finds it worth while."""
    return [FLOAT32, BFLOAT16] if bfloat16_gain() >= WORTH else [FLOAT32]


def _ours(config: ModelConfig, stack: ExitStack, *, precision: str) -> Callable[[], float]:
    return our_step(started(config), random_tokens(config), stack, within=WITHIN[precision])


def _theirs(config: ModelConfig, stack: ExitStack, *, compiling: bool, precision: str) -> Callable[[], float]:
    experts = "grouped_mm" if compiling else "eager"
    model = peer_model(config, **({"experts_implementation": experts} if config.num_experts else {}))
    return peer_step(model, random_tokens(config), compiling=compiling, within=WITHIN[precision])


def _speeds(
    config: ModelConfig, peers: Mapping[str, bool], matches: Sequence[Match], quick: bool
) -> Iterator[Line]:
    """A line for each match. `peers` says which are compiled."""
    precisions = sorted({name for match in matches for name in match.types})
    contenders: dict[tuple[str, str], Start] = {
        ("ours", name): partial(_ours, config, precision=name) for name in precisions
    }
    if peer_is_here():
        contenders |= {
            (peer, name): partial(_theirs, config, compiling=compiling, precision=name)
            for peer, compiling in peers.items()
            for name in precisions
        }
    with ExitStack() as stack:
        running = {key: stack.enter_context(apart(start)) for key, start in contenders.items()}
        limits = {name: products(dtype=getattr(torch, name)) for name in precisions}
        running |= {("products", name): timed(multiply) for name, (multiply, _) in limits.items()}
        seconds = interleaved(running, rounds=3 if quick else 15)
    median = {key: statistics.median(spent) for key, spent in seconds.items()}

    def faster(who: str, match: Match) -> tuple[str, str]:
        return min(((who, name) for name in match.types), key=lambda key: median.get(key, 0.0))

    def speed(key: tuple[str, str]) -> float | None:
        return ROWS * CONTEXT / median[key] if key in median else None

    for match in matches:
        ours, peer = faster("ours", match), faster(match.peer, match)
        known = peer in seconds
        operations = limits[ours[1]][1]
        mine = speed(ours)
        assert mine is not None
        yield line(
            match.metric,
            mine,
            speed(peer),
            peer_name(match.peer, "fused AdamW"),
            SPEED,
            ratio=paired(seconds[ours], seconds[peer]) if known else None,
            target=match.target if known else None,
            limit=operations / median["products", ours[1]] / flops_per_token(config, CONTEXT),
            types={"ours": ours[1]} | ({"peer": peer[1]} if known else {}),
            medians={
                " in ".join(key): round(ROWS * CONTEXT / spent)
                for key, spent in median.items()
                if key[0] in ("ours", match.peer) and key[1] in match.types
            },
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


def precision(quick: bool) -> Iterator[Line]:
    """What products in bfloat16 cost in what is learned, where a training stage would take them."""
    if BFLOAT16 not in types():
        return
    tokens, windows, seeds = (40_960, 32, 1) if quick else (409_600, 256, 3)
    for kind, config in {"dense": pretrain_learning.WIDE, "moe": pretrain_learning.WIDE_SPARSE}.items():
        bits = {
            name: [
                pretrain_learning.learned(
                    pretrain_learning.MUON, tokens, windows, config=config, seed=seed, within=WITHIN[name]
                )
                for seed in range(seeds)
            ]
            for name in (BFLOAT16, FLOAT32)
        }
        ours, other = (statistics.mean(bits[name]) for name in (BFLOAT16, FLOAT32))
        yield line(
            f"bfloat16_learning_{kind}",
            ours,
            other,
            "the same in float32",
            f"bits per byte, mean of {seeds} seeds",
            tokens=tokens,
            difference=round(ours - other, 4),
            seeds={name: [round(value, 4) for value in values] for name, values in bits.items()},
        ) | {"target": 0.01, "reached": ours - other <= 0.01}


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
    "precision": precision,
    "loading": loading,
    "parity": pretrain_parity.lines,
    "balance": balance,
}


if __name__ == "__main__":
    main()
