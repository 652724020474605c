"""What a plan says against what happens: memory of real training steps on this CPU, and a simulated cluster.

    python -m benchmarks.plan [--quick]

Real steps: every shape trains two steps in a process of its own, in float32 with the official vocabulary. `ours` is
the planner's prediction, `peer` the peak of the resident memory above what the process held after the same steps of a
model of a few thousand parameters, which load libraries and start threads. Resident memory is what a machine runs out
of: it counts what kernels take inside and what the allocator keeps, which a count of tensors does not. The C library
is told to return large blocks at once, so that resident is what is in use.

Simulated steps: the 235B model on 1,024 ranks, by its own parallel code with pretended ranks and tensors. `ours` is
predicted, `peer` simulated.

`difference_percent` is ours over peer; `limit` is the difference allowed, of which `percent_of_limit` is used.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pensar.base.ranks import Crew, World
from pensar.base.usage import reset_peak, usage_now
from pensar.model.config import ModelConfig, replace
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.sizes import size
from pensar.train.accelerators import accelerator
from pensar.train.comparison import compare
from pensar.train.footprint import Step, memory
from pensar.train.layout import Layout, parse_layout
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.parallel.optimizer import ShardedOptimizer
from pensar.train.parallel.run import opened_mesh, spread_model
from pensar.train.parallel.shard import from_seed
from pensar.train.parallel.step import Meshed
from pensar.train.recompute import recomputed
from pensar.train.simulate import even_batches
from pensar.train.step import train_step

ALLOWED_PERCENT = 10.0
GIB = 1 << 30
STEPS = 2
DENSE = ModelConfig(
    vocab_size=151_936,
    hidden_size=256,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=768,
    tied=True,
)
EXPERTS = replace(DENSE, intermediate_size=0, num_experts=16, experts_per_token=4, moe_intermediate_size=256)
SMALL = {"vocab_size": 512, "num_layers": 2}
"""Of the model whose steps come before those that are measured."""
STEP = Step(context=512, rows=4, chunk_tokens=512, compute_bytes=4, on_cpu=True)
CLUSTERS = {
    "fsdp1024_ep64": ("shard=1024,ep=64,recompute=full", 4_096),
    "fsdp1024_ep64_kept": ("shard=1024,ep=64", 4_096),
    "fsdp128_cp8_ep64_32k": ("shard=128,cp=8,ep=64,recompute=full", 32_768),
    "fsdp256_tp4_ep64": ("shard=256,tp=4,ep=64,recompute=full", 4_096),
    "fsdp64_cp2_ep8_pp4": ("replicate=2,shard=64,cp=2,ep=8,pp=4,micro_batches=8,recompute=full", 4_096),
}


class Case(NamedTuple):
    model: ModelConfig
    layout: Layout
    step: Step


CASES = {
    "dense": Case(DENSE, Layout(), STEP),
    "dense_selective": Case(DENSE, Layout(recompute="selective"), STEP),
    "dense_full": Case(DENSE, Layout(recompute="full"), STEP),
    "dense_untied_muon": Case(replace(DENSE, tied=False), Layout(recompute="full"), replace(STEP, muon=True)),
    "dense_two_passes": Case(DENSE, Layout(), replace(STEP, rows=2, accumulate=2)),
    "experts": Case(EXPERTS, Layout(), STEP),
    "experts_full": Case(EXPERTS, Layout(recompute="full"), replace(STEP, muon=True)),
    "dense_two_ranks": Case(DENSE, Layout(dp_shard=2), replace(STEP, rows=2)),
    "experts_two_ranks": Case(EXPERTS, Layout(dp_shard=2, ep=2, recompute="full"), replace(STEP, rows=2)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two shapes and one simulated layout")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured_bytes(CASES[options.measure])))
        return
    for name in list(CASES)[:2] if options.quick else CASES:
        case = CASES[name]
        predicted = memory(case.model, case.layout, case.step)
        real = _in_a_process(name)
        _say(f"memory_{name}", predicted.total, real, "real steps, resident memory", moment=predicted.moment)
    for name in list(CLUSTERS)[:1] if options.quick else CLUSTERS:
        _simulated(name)


def measured_bytes(case: Case) -> int:
    """The peak of rank 0's resident memory in steps of the case, above that after steps of a small model."""
    torch.set_num_threads(1)
    with Crew(case.layout.ranks, threads=1) as crew:
        small = case._replace(model=replace(case.model, **SMALL))
        crew.call(_train, small)
        before = _resident_bytes()
        crew.call(_train, case)
        return usage_now().peak_memory_bytes - before


def _train(world: World, case: Case) -> None:
    reset_peak()
    config, batches = OptimizerConfig(muon=case.step.muon), even_batches(case.model, case.layout, case.step)
    loss = LossConfig(chunk_tokens=case.step.chunk_tokens)
    if case.layout.ranks == 1:
        model = Qwen3(case.model).train()
        initialize(model, 1)
        optimizer = Optimizer(model, config)
        with recomputed(model, case.layout.recompute):
            for _ in range(STEPS):
                train_step(model, optimizer, batches, 1.0, world, loss)
        return
    with opened_mesh(world, case.layout) as mesh:
        model = spread_model(case.model, mesh, from_seed(case.model, 1))
        reset_peak()  # every rank has drawn the whole tensors one after the other
        spread, sharded = Meshed(mesh), ShardedOptimizer(model, config, mesh)
        with recomputed(model, case.layout.recompute):
            for _ in range(STEPS):
                train_step(model, sharded, batches, 1.0, spread, loss)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _in_a_process(name: str) -> int:
    blocks = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan", "--measure", name],
        env=os.environ | blocks | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(json.loads(done.stdout))


def _simulated(name: str) -> None:
    text, context = CLUSTERS[name]
    model, layout = size("235b-a22b"), parse_layout(text)
    found = compare(model, layout, Step(context=context), accelerator("h200"))
    peer = "simulated step of the first rank"
    rest = {
        "layout": text,
        "context": context,
        "depths": found.simulated.depths,
        "bend": found.simulated.bend,
    }
    _say(f"peak_235b_1024_{name}", *found.peak[1:], peer, moment=found.simulated.moment, **rest)
    for row in found.exchanges:
        if row.predicted:
            what = row.name.replace(" ", "_").replace("-", "_")
            _say(f"{what}_235b_1024_{name}", *row[1:], peer, layout=text, context=context)


def _say(metric: str, ours: float, peer: float, peer_name: str, **rest: Any) -> None:
    difference = 100 * (ours / peer - 1)
    line = {
        "metric": metric,
        "ours": round(ours / GIB, 3),
        "peer": round(peer / GIB, 3),
        "peer_name": peer_name,
        "unit": "GiB",
        "ratio": None,
        "limit": ALLOWED_PERCENT,
        "percent_of_limit": round(100 * abs(difference) / ALLOWED_PERCENT, 1),
        "difference_percent": round(difference, 2),
        **rest,
        "machine": _machine(),
    }
    print(json.dumps(line), flush=True)


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    return f"{name}, 1 thread a rank, torch {torch.__version__}"


if __name__ == "__main__":
    main()
