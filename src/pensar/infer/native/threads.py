"""How many threads a model is computed with fastest, found by trying: small models wait more than they gain."""

import os
import time

from pensar.infer.native.runner import NativeRunner
from pensar.infer.step import StepBatch

ROWS = 8
"""Of the step that is tried: between one user and many."""
REPEATS = 7
WORTH = 0.9
"""Share of the time with fewer threads that a step may take for more threads to be taken."""


def take_fastest(runner: NativeRunner, most: int | None = None, *, pin: bool = False) -> int:
    """Lets `runner` compute with 1, 2, 4, ... up to `most` threads, by default as many as there are cores for this
    process, whichever is fastest on the machine as it is now; returns their number. Results do not depend on it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best, least = 1, seconds(runner, 1)
    threads = 2
    while threads <= (cores if most is None else min(most, cores)):
        taken = seconds(runner, threads, pin=pin)
        if taken > WORTH * least:
            break
        best, least = threads, taken
        threads *= 2
    runner.use_threads(best, pin=pin)
    return best


def seconds(runner: NativeRunner, threads: int, *, pin: bool = False) -> float:
    """Of a step of ROWS rows with so many threads, on the clock: the least of a few."""
    runner.use_threads(threads, pin=pin)
    batch = StepBatch.of([([0], 0, [0])] * ROWS)  # in nobody's page
    runner.run(batch)
    spent = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        runner.run(batch)
        spent.append(time.perf_counter() - start)
    return min(spent)
