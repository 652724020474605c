"""What the engine costs besides computing: its share of a step, starting up, memory beyond the plan, new weights."""

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import engine_ours
from benchmarks.engine_rollouts import CONFIG as SMALL
from benchmarks.engine_work import CONFIG, ONE_THREAD, ROOT, directory, prompts_of
from benchmarks.pretrain_memory import resident
from benchmarks.pretrain_steps import line
from pensar.base.usage import reset_peak, usage_now
from pensar.infer import commit
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import load_model

Line = dict[str, Any]
BATCH = 64
SAMPLING = ("sample", "uniforms", "rules_of", "logprobs", "top_logprobs")
"""What commit.py calls to choose tokens and to score them."""
TINY = ModelConfig(
    vocab_size=480,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=192,
    tied=True,
)
"""The size that the quick recipe trains."""


# ---------------------------------------------------------------- the engine's own share of a step


def overhead(quick: bool) -> Iterator[Line]:
    """The share of decode steps of 64 rows that is neither the runner's nor sampling, by CPU-time of one thread."""
    for config, size in ((CONFIG, ""), (SMALL, "_small_model")):
        for kind in engine_ours.kinds():
            if kind == "int4":
                continue
            share, seconds = _own_share(config, kind, steps=40 if quick else 200)
            yield line(
                engine_ours.named(f"scheduler_overhead_batch_64{size}", kind, "int8"),
                100 * share,
                None,
                "none",
                "% of a step",
                target=None if size else 3.0,
                sign=-1,
                limit=None,
                ours_kind=kind,
                step_milliseconds=round(1000 * seconds, 3),
                own_microseconds=round(1e6 * share * seconds, 1),
            ) | {"limit": 0.0}


def _own_share(config: ModelConfig, kind: str, steps: int) -> tuple[float, float]:
    """Its own share of a step, and the seconds of a step, both medians."""
    model = Qwen3(config).eval()
    initialize(model, 0)
    engine = Engine(engine_ours.runner_of(model, kind), slots=BATCH, max_tokens_per_slot=64 + steps)
    params = SamplingParams(max_tokens=steps + 8, temperature=1.0, logprobs=True, ignore_eos=True)
    for number, prompt in enumerate(prompts_of(0, BATCH, config, length=32)):
        engine.submit(Request(str(number), prompt, params))
    spent = [0.0]

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[0] += time.thread_time() - start

        return call

    shares, seconds = [], []
    with ExitStack() as stack:
        for name in SAMPLING:
            stack.enter_context(mock.patch.object(commit, name, counted(getattr(commit, name))))
        stack.enter_context(mock.patch.object(engine.runner, "run", counted(engine.runner.run)))
        while engine.num_waiting or engine.num_running < BATCH:
            engine.step()
        for number in range(steps):
            spent[0], start = 0.0, time.thread_time()
            pieces = engine.step()
            whole = time.thread_time() - start
            assert len(pieces) == BATCH
            if number >= 4:
                shares.append((whole - spent[0]) / whole)
                seconds.append(whole)
    return statistics.median(shares), statistics.median(seconds)


# ---------------------------------------------------------------- start-up


def startup(quick: bool) -> Iterator[Line]:
    """From the start of a process to the first token of a tiny model, in CPU-seconds of the process.

    Beside other work the clock on the wall tells of the others. The limit is a process that imports torch.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = directory(Path(folder) / "model", TINY)
        programs = {
            "ours": ["-m", "benchmarks.engine_first_token", str(source)],
            "torch": ["-c", "import torch; torch.ones(1)"],
        }
        spent: dict[str, list[float]] = {name: [] for name in programs}
        wall: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(3 if quick else 8):
            for name, program in programs.items():
                start, before = time.perf_counter(), _children_seconds()
                subprocess.run([sys.executable, *program], check=True, cwd=ROOT, env=os.environ | ONE_THREAD)
                if number:
                    wall[name].append(time.perf_counter() - start)
                    spent[name].append(_children_seconds() - before)
    ours, limit = statistics.median(spent["ours"]), statistics.median(spent["torch"])
    yield line(
        "startup_to_first_token",
        ours,
        None,
        "none",
        "CPU-seconds",
        target=2.0,
        sign=-1,
        least_wall_seconds={name: round(min(values), 3) for name, values in wall.items()},
    ) | {"limit": round(limit, 3), "percent_of_limit": round(100 * limit / ours, 1)}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---------------------------------------------------------------- memory


def memory(quick: bool) -> Iterator[Line]:
    """Resident memory at the highest, above what the imports take, against weights, cache and a step's activations."""
    with tempfile.TemporaryDirectory() as folder:
        source = directory(Path(folder) / "model")
        for kind in engine_ours.kinds():
            yield _memory_line(source, kind)


def _memory_line(source: Path, kind: str) -> Line:
    program = (
        f"from benchmarks.engine_costs import *; print(json.dumps(memory_use({str(source)!r}, {kind!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    )
    measured, planned = json.loads(done.stdout.splitlines()[-1])
    return line(
        engine_ours.named("memory_off_plan", kind, "int8"),
        100 * abs(measured / planned - 1),
        None,
        "none",
        "% of the plan: weights, cache, activations of a step",
        target=5.0,
        sign=-1,
        measured_mib=round(measured / 2**20, 1),
        planned_mib=round(planned / 2**20, 1),
    ) | {"limit": 0.0}


def memory_use(folder: str, kind: str) -> tuple[int, int]:
    """Bytes that a full engine takes at its highest, and what was planned for it."""
    torch.set_num_threads(1)
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))  # the libraries' own buffers
    gc.collect()
    before = resident()
    reset_peak()
    model = load_model(Path(folder))
    engine = Engine(engine_ours.runner_of(model, kind), slots=BATCH, max_tokens_per_slot=1_024)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    # Every slot filled with its own text, so that every page of the cache is written to.
    prompts = prompts_of(0, BATCH, CONFIG, length=1_016)
    engine.run([Request(str(number), prompt, params) for number, prompt in enumerate(prompts)])
    return usage_now().peak_memory_bytes - before, engine.footprint.total


# ---------------------------------------------------------------- new weights


def sync(quick: bool) -> Iterator[Line]:
    """Taking over a trainer's weights while 64 replies are under way. The limit is a copy of as many bytes."""
    for config, size, target in ((TINY, "tiny", 100.0), (SMALL, "1m", 100.0), (CONFIG, "34m", None)):
        for kind in engine_ours.kinds():
            if kind == "int4":
                continue
            ours, limit = _sync_seconds(config, kind, rounds=5 if quick else 20)
            yield line(
                engine_ours.named(f"weight_sync_{size}", kind, "int8"),
                1000 * ours,
                None,
                "none",
                "milliseconds",
                target=target,
                sign=-1,
                ours_kind=kind,
            ) | {"limit": round(1000 * limit, 4), "percent_of_limit": round(100 * limit / ours, 1)}


def _sync_seconds(config: ModelConfig, kind: str, rounds: int) -> tuple[float, float]:
    """Median seconds of a load, and of copying the weights."""
    model = Qwen3(config).eval()
    initialize(model, 0)
    engine = Engine(engine_ours.runner_of(model, kind), slots=BATCH, max_tokens_per_slot=128)
    params = SamplingParams(max_tokens=2 * rounds + 16, ignore_eos=True)
    for number, prompt in enumerate(prompts_of(0, BATCH, config, length=16)):
        engine.submit(Request(str(number), prompt, params))
    engine.step()
    loads, copies = [], []
    targets = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for number in range(rounds):
        trainer = Qwen3(config).eval()
        initialize(trainer, number + 1)
        weights = {name: value.detach() for name, value in trainer.named_parameters()}
        start = time.process_time()
        engine.load(weights)
        loads.append(time.process_time() - start)
        assert len(engine.step()) == BATCH
        start = time.process_time()
        for target, value in zip(targets, weights.values(), strict=True):
            target.copy_(value)
        copies.append(time.process_time() - start)
    return statistics.median(loads), statistics.median(copies)
