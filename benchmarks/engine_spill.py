"""When a spill of the cache is worth its room: a prompt copied back against the same prompt computed again.

Two prompts of 64 pages take turns in a cache that holds one of them, so every turn gives 64 pages away and wants 64.
A file of that size stays in the system's own cache of files: its lines say what the calls cost, not what a disk does.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import engine_ours
from benchmarks.engine_work import CONFIG, prompts_of
from benchmarks.pretrain_steps import line, rounded
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.spill import SpillConfig
from pensar.infer.step import PAGE
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize

Line = dict[str, Any]
PAGES = 64


def spill(quick: bool) -> Iterator[Line]:
    """CPU-time of one thread for a prompt and its first token, in microseconds a page of the prompt."""
    for kind in engine_ours.kinds():
        if kind == "int4":
            continue
        for place in ("memory", "disk"):
            yield spill_line(CONFIG, kind, place, rounds=3 if quick else 10)


def spill_line(config: ModelConfig, kind: str, place: str, rounds: int) -> Line:
    """`ours` gives a page away and takes one back; the peer gives it away for nothing and computes it."""
    model = Qwen3(config).eval()
    initialize(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        runner = engine_ours.runner_of(model, kind)
        kept = SpillConfig(
            max_bytes=4 * PAGES * runner.page_bytes(), folder=Path(folder) if place == "disk" else None
        )
        engines = {
            "ours": Engine(runner, cache_tokens=(PAGES + 1) * PAGE, spill=kept),
            "peer": Engine(engine_ours.runner_of(model, kind), cache_tokens=(PAGES + 1) * PAGE),
        }
        spent: dict[str, list[float]] = {name: [] for name in engines}
        wall: dict[str, list[float]] = {name: [] for name in engines}
        prompts = prompts_of(0, 2, config, length=PAGES * PAGE + 1)
        for turn in range(2 + 2 * rounds):
            tokens = {}
            for name, engine in engines.items():
                before, start = time.perf_counter(), time.thread_time()
                [done] = engine.run([Request("x", prompts[turn % 2], SamplingParams(max_tokens=1))])
                if turn >= 2:
                    spent[name].append((time.thread_time() - start) / PAGES)
                    wall[name].append((time.perf_counter() - before) / PAGES)
                tokens[name] = done.tokens
                assert done.num_cached_tokens == (PAGES * PAGE if name == "ours" and turn >= 2 else 0)
            assert tokens["ours"] == tokens["peer"] or not kind.endswith("float32")
        page_kib = runner.page_bytes() / 2**10
    ours, peer = (statistics.median(spent[name]) for name in ("ours", "peer"))
    return line(
        f"{engine_ours.named('spill_to', kind, 'int8')}_{place}",
        1e6 * ours,
        1e6 * peer,
        "computed again",
        "CPU-microseconds a page",
        ratio=peer / ours,
        page_tokens=PAGE,
        page_kib=rounded(page_kib),
        wall_microseconds={name: rounded(1e6 * statistics.median(values)) for name, values in wall.items()},
    )
