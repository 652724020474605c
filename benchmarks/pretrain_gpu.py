"""Pre-training on one GPU: first whether it is right, then memory against its prediction, then speed.

    python -m benchmarks.pretrain_gpu [--quick] [--only checks memory dense long experts float8 muon attention]

Speeds are model FLOPs utilisation: the operations that the model needs (causal attention counted half, nothing that is
computed again), over the vendor's dense bfloat16 peak (`train/accelerators.py`). The peer is transformers on the same
card in the same run, step by step in turns: compiled, bfloat16 by autocast, fused AdamW. Everything takes under twenty
minutes on an H100 or H200. Without a GPU one line says so. The exit code is 1 when a check failed or a part broke.
"""

import argparse
import importlib.util
import json
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks import gpu_checks
from benchmarks.gpu_training import Case, batches_of, peak_bytes, peer_training, seconds_of, training
from pensar.model import hardware
from pensar.model.config import replace
from pensar.model.count import flops_per_token
from pensar.model.sizes import size
from pensar.train import footprint
from pensar.train.accelerators import ACCELERATORS
from pensar.train.layout import Layout
from pensar.train.speed import table_row

Line = dict[str, Any]
SHORT_VOCABULARY = 16_384
"""For shapes of a few layers, whose output projection would otherwise be most of the work."""
PEER = "transformers"
MEMORY_TOLERANCE = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options = parser.parse_args()
    reason = unfit()
    if reason:
        show(line_of("pretrain_gpu", reason=reason))
        return 0
    failed = False
    for name in options.only:
        try:
            for line in PARTS[name](3 if options.quick else 7):
                show(line)
                failed |= line.get("reached") is False and name == "checks"
        except Exception as error:  # noqa: BLE001 - the other parts are worth having
            traceback.print_exc()
            show(line_of(name, reason=f"broke: {type(error).__name__}: {error}"[:300]))
            failed = True
    return int(failed)


def unfit() -> str:
    """Why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device here; run this on a machine with an H100 or H200"
    device = torch.device("cuda", 0)
    if hardware.capability(device) < hardware.AMPERE:
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 units; run this on an H100 or H200"
    return ""


def checks(_: int) -> Iterator[Line]:
    """Every accelerated path against float64 or a plainer one."""
    device = torch.device("cuda", 0)
    tests: list[Callable[[], list[gpu_checks.Finding]]] = [
        lambda: gpu_checks.attention(device),
        lambda: gpu_checks.logits(device, gpu_checks.small()),
        lambda: gpu_checks.experts(device),
    ]
    if hardware.capability(device) >= hardware.ADA:
        tests.append(lambda: gpu_checks.float8_follows(gpu_checks.small()))
    for test in tests:
        for found in test():
            yield error_line(found)


def error_line(found: gpu_checks.Finding) -> Line:
    """A comparison as a line of output."""
    return line_of(
        f"{found.name}_error",
        found.error,
        unit="relative error",
        peer_name=found.reference,
        target=found.allowed,
        reached=found.error <= found.allowed,
    )


def memory(_: int) -> Iterator[Line]:
    """Peak of the step as written against the planner's formula."""
    dense = Case(config=size("0.6b"), context=4_096, rows=2)
    sparse = dense.but(config=_few_experts(2), rows=2)
    for name, case in (("dense", dense), ("experts", sparse)):
        for mode in ("none", "selective", "full"):
            now = case.but(recompute=mode)
            with training(now, batches_of(now)) as step:
                peak = peak_bytes(step)
            planned = footprint.memory(
                now.config,
                Layout(recompute=mode),
                footprint.Step(context=now.context, rows=now.rows, compute_bytes=2),
            )
            yield line_of(
                f"peak_memory_{name}_{mode}",
                peak / 2**30,
                planned.total / 2**30,
                unit="GiB",
                peer_name=f"train/footprint.py, at {planned.moment}",
                ratio=round(planned.total / peak, 3),
                target=MEMORY_TOLERANCE,
                reached=abs(planned.total / peak - 1) <= MEMORY_TOLERANCE,
            )


def dense(rounds: int) -> Iterator[Line]:
    """The 0.6b shape at 4,096 tokens, as written and compiled, and packed documents."""
    case = Case(config=size("0.6b"), context=4_096, rows=4)
    yield from timed("dense_4k_as_written", case, rounds)
    case = case.but(compile=True)
    yield from timed("dense_4k", case, rounds, peer=True, target=50)
    yield from timed("dense_4k_packed", case.but(documents=8), rounds)


def long(rounds: int) -> Iterator[Line]:
    """The 0.6b shape at 32,768 tokens; with little memory blocks keep products and attention alone."""
    mode: Any = "none" if _gigabytes() > 100 else "selective"
    case = Case(config=size("0.6b"), context=32_768, rows=1, compile=True, recompute=mode)
    yield from timed("dense_32k", case, rounds, target=40)
    yield from timed("dense_32k_packed", case.but(documents=4), rounds)


def experts(rounds: int) -> Iterator[Line]:
    """30b-a3b's layers, as many as fit with their optimiser."""
    case = Case(config=_few_experts(4 if _gigabytes() > 100 else 3), context=4_096, rows=4)
    yield from timed("experts_4k_as_written", case, rounds)
    yield from timed("experts_4k", case.but(compile=True), rounds, peer=True, target=35)


def float8(rounds: int) -> Iterator[Line]:
    """8b's layers, four of them, in float8 and in bfloat16."""
    if hardware.capability(torch.device("cuda", 0)) < hardware.ADA:
        yield line_of("float8_over_bfloat16", reason="this GPU has no float8 units")
        return
    config = replace(size("8b"), num_layers=4, vocab_size=SHORT_VOCABULARY)
    case = Case(config=config, context=4_096, rows=4, compile=True)
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(training(case.but(precision=name), batches_of(case)))
            for name in ("float8", "bfloat16")
        }
        seconds = seconds_of(steps, rounds)
    ours, peer = (case.tokens / seconds[name] for name in ("float8", "bfloat16"))
    yield line_of(
        "float8_over_bfloat16",
        ours,
        peer,
        unit="tokens per second",
        peer_name="the same in bfloat16",
        target=1.25,
        reached=ours / peer >= 1.25,
    )


def muon(rounds: int) -> Iterator[Line]:
    """What a step with Muon costs beside one with AdamW."""
    case = Case(config=size("0.6b"), context=4_096, rows=4, compile=True, muon=True)
    with training(case, batches_of(case)) as step, training(case.but(muon=False), batches_of(case)) as other:
        seconds = seconds_of({"muon": step, "adamw": other}, rounds)
    yield line_of(
        "dense_4k_muon",
        case.tokens / seconds["muon"],
        case.tokens / seconds["adamw"],
        unit="tokens per second",
        peer_name="the same with AdamW",
    )


def attention(rounds: int) -> Iterator[Line]:
    """Forward and backward of one layer's attention, whole rows and packed documents, by each kernel."""
    from benchmarks.gpu_attention import measured

    for found in measured(torch.device("cuda", 0), rounds):
        limit = _peak() / 1e12
        yield line_of(
            found.name, found.teraflops, unit="TFLOP/s", limit=limit, percent=100 * found.teraflops / limit
        )


def timed(
    name: str, case: Case, rounds: int, *, peer: bool = False, target: float | None = None
) -> Iterator[Line]:
    """Utilisation and tokens a second of one training, and of the peer's in the same minutes."""
    batches = batches_of(case)
    flops, why = flops_per_token(case.config, case.context // case.documents), None
    with ExitStack() as stack:
        steps = {"ours": stack.enter_context(training(case, batches))}
        if peer and importlib.util.find_spec(PEER) is None:
            why = f"{PEER} is not installed"
        elif peer:
            try:
                steps[PEER] = stack.enter_context(peer_training(case, batches, torch.device("cuda", 0)))
                steps[PEER]()
            except Exception as error:  # noqa: BLE001 - its failure is not ours, and its reason is told
                traceback.print_exc()
                why = f"{PEER} broke: {type(error).__name__}: {error}"[:300]
                steps.pop(PEER, None)
        seconds = seconds_of(steps, rounds)
    ours = case.tokens / seconds["ours"]
    theirs = case.tokens / seconds[PEER] if PEER in seconds else None
    share = 100 * flops * ours / _peak()
    yield line_of(
        f"{name}_tokens_per_second",
        ours,
        theirs,
        unit="tokens per second",
        peer_name=f"{PEER} {_version(PEER)} + torch.compile + fused AdamW" if peer else None,
        limit=_peak() / flops,
        percent=share,
        target=target,
        reached=None if target is None else share >= target,
        teraflops=round(flops * ours / 1e12, 1),
        shape=_described(case),
        reason=why,
    )


def line_of(
    metric: str,
    ours: float | None = None,
    peer: float | None = None,
    *,
    unit: str | None = None,
    peer_name: str | None = None,
    ratio: float | None = None,
    limit: float | None = None,
    percent: float | None = None,
    **more: Any,
) -> Line:
    """A line of the benchmarks' common form; `more` is what else there is to say."""
    if ratio is None and ours and peer:
        ratio = round(ours / peer, 3)
    return {
        "metric": metric,
        "ours": _rounded(ours),
        "peer": _rounded(peer),
        "peer_name": peer_name,
        "unit": unit,
        "ratio": ratio,
        "limit": _rounded(limit),
        "percent_of_limit": None if percent is None else round(percent, 1),
        "machine": machine(),
        **{key: value for key, value in more.items() if value is not None},
    }


def show(line: Line) -> None:
    print(json.dumps(line), flush=True)


def machine() -> str:
    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{platform.machine()}, no GPU"
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"{where}, torch {torch.__version__}{cuda}, Python {platform.python_version()}"


def _few_experts(layers: int) -> Any:
    return replace(size("30b-a3b"), num_layers=layers, vocab_size=SHORT_VOCABULARY)


def _described(case: Case) -> str:
    config = case.config
    kind = f"{config.num_experts} experts" if config.num_experts else "dense"
    return (
        f"{config.num_layers} layers of {config.hidden_size}, {kind}, vocabulary {config.vocab_size}, "
        f"{case.rows} x {case.context} tokens in {case.rows * case.documents} documents, "
        f"recompute {case.recompute}, {'compiled' if case.compile else 'as written'}"
    )


def _peak() -> float:
    """Dense bfloat16 operations a second by the vendor's figures."""
    row = table_row(torch.cuda.get_device_name(0))
    return ACCELERATORS[row or "h100"].bf16_flops


def _gigabytes() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 1e9


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


PARTS: dict[str, Callable[[int], Iterator[Line]]] = {
    "checks": checks,
    "memory": memory,
    "dense": dense,
    "long": long,
    "experts": experts,
    "float8": float8,
    "muon": muon,
    "attention": attention,
}


if __name__ == "__main__":
    sys.exit(main())
