"""A soak: 100,000 random requests through one engine that is interrupted, short of pages and broken all the time.

Many begin alike, many have one prompt, most wait, and pages never suffice, so that requests give way to one another
and come back. Meanwhile callers take out requests at any moment, change budgets, use the ids of those that have gone,
and ask for what cannot be; deadlines pass, weights are exchanged, a token's embedding is NaN, memory is refused, and
guesses are switched on and off. `ours` counts the faults: pages that are in two states or in none, requests that end
twice or never, pieces that do not add up, and replies that are not, bit for bit, what the request gives alone.

With the native kernels no token of a text is broken by one behind it, nor by what a page held before. Torch's attention
multiplies what is masked by nothing, which NaN survives: there no token is broken, weights are float64, and
log-probabilities are compared to 1e-4. Memory is that of the process, with nothing under way, after a tenth of the
requests and after all.
"""

import gc
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.engine_soak_work import CONFIG, Requests, model_of, tokenizer_of
from benchmarks.pretrain_memory import resident
from benchmarks.pretrain_steps import line
from pensar.base.errors import ModelError
from pensar.base.usage import reset_peak, usage_now
from pensar.infer.drafts.draft_model import DraftModel
from pensar.infer.drafts.lookup import Lookup
from pensar.infer.drafts.proposer import FirstOf
from pensar.infer.engine import Completion, Engine, Piece, Request
from pensar.infer.native.library import available
from pensar.infer.native.runner import NativeRunner
from pensar.infer.speculate import Speculation
from pensar.infer.spill import SpillConfig
from pensar.infer.step import PAGE, Runner, StepBatch, StepOutput
from pensar.infer.torch_runner import TorchRunner
from pensar.model.config import replace

Line = dict[str, Any]
NUM, NUM_TORCH = 100_000, 10_000
SLOTS, PAGES, STEP_TOKENS = 24, 72, 96
MOST_UNFINISHED = 64
WEIGHTS = 3
"""Sets of weights that take turns."""
SAMPLED = 40
"""Of so many replies one is drawn again alone."""
CHECKED = 50
"""Steps from one look at the pages to the next."""
LEAK = 8.0
"""MiB that would be a hundred bytes a request."""


def soak(quick: bool) -> Iterator[Line]:
    torch.set_num_threads(1)
    share = 20 if quick else 1
    if available():
        yield from _lines("native", Soak(native=True), NUM // share)
    yield from _lines("torch", Soak(native=False), NUM_TORCH // share)


def _lines(name: str, work: "Soak", num: int) -> Iterator[Line]:
    start, cpu = time.perf_counter(), time.process_time()
    work.run(num // 10)
    reset_peak()
    before, objects = _settled()
    peak = usage_now().peak_memory_bytes
    work.run(num - num // 10)
    growth = (usage_now().peak_memory_bytes - peak) / 2**20
    after, more = _settled()
    seconds = time.process_time() - cpu
    engine = work.engine
    yield line(
        f"soak_{name}",
        len(work.faults),
        None,
        "none",
        f"faults in {num:,} requests",
        target=0,
        sign=-1,
        first_faults=work.faults[:3],
        counts=dict(sorted((work.counts + engine_counts(engine)).items())),
        wall_seconds=round(time.perf_counter() - start, 1),
        cpu_seconds=round(seconds, 1),
        requests_per_cpu_second=round(num / seconds, 1),
    ) | {"limit": 0.0}
    yield line(
        f"soak_{name}_memory_growth",
        (after - before) / 2**20,
        None,
        "none",
        "MiB from a tenth of the requests to all",
        target=LEAK,
        sign=-1,
        resident_mib=round(after / 2**20, 1),
        peak_growth_mib=round(growth, 2),
        python_objects_more=more - objects,
    ) | {"limit": 0.0}


def engine_counts(engine: Engine) -> Counter[str]:
    """What the engine itself counts."""
    spill = engine.pool.spill
    return Counter(
        preemptions=engine.scheduler.num_preempted,
        weight_loads=engine.version,
        pages_spilled=0 if spill is None else spill.num_saved,
        pages_brought_back=0 if spill is None else spill.num_restored,
    )


def _settled() -> tuple[int, int]:
    gc.collect()
    return resident(), len(gc.get_objects())


@dataclass(slots=True)
class Open:
    """A request that has not ended, and what is known of it."""

    request: Request
    most_budget: float
    pieces: list[Piece] = field(default_factory=list)
    changed: bool = False
    """By its caller or by new weights: alone it would be another reply."""

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]


class Soak:
    """One engine, those who use it, and a second engine in which requests are alone."""

    def __init__(self, *, native: bool, seed: int = 0, sampled: int = SAMPLED) -> None:
        self.tokenizer = tokenizer_of()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._native, self._sampled = native, sampled
        self._rng = np.random.default_rng(seed)
        self._requests = Requests(self.tokenizer, seed + 1)
        self._dtype = torch.float32 if native else torch.float64
        self._models = [model_of(n, dtype=self._dtype, broken=native) for n in range(WEIGHTS)]
        self._now = 0.0
        runner = self._runner(model_of(0, dtype=self._dtype, broken=native))
        self.engine = Engine(
            runner,
            self.tokenizer,
            slots=SLOTS,
            cache_tokens=PAGES * PAGE,
            step_tokens=STEP_TOKENS,
            spill=SpillConfig(max_bytes=PAGES * runner.page_bytes()) if native else None,
            clock=lambda: self._now,
        )
        self._compute, self._refusals = runner.run, 0
        runner.run = self._run  # type: ignore[method-assign]
        self._alone = [Engine(self._runner(model), self.tokenizer, slots=1) for model in self._models]
        self._speculation = Speculation(self._guesser(), max_drafts=3, adaptive=False)
        self._weights = 0
        self._open: dict[str, Open] = {}
        self._crowd = MOST_UNFINISHED

    # ------------------------------------------------------------ the load

    def run(self, num: int) -> None:
        """Serves `num` requests to their ends."""
        rng, goal = self._rng, self.counts["requests"] + num
        while self._open or self.counts["requests"] < goal:
            if rng.random() < 0.02:
                self._crowd = int(rng.integers(0, MOST_UNFINISHED))
            while len(self._open) <= self._crowd and self.counts["requests"] < goal:
                self._submit()
                if rng.random() < 0.3:
                    break
            self._disturb()
            self._step()
        self._step()
        self._empty()

    def _submit(self, name: str | None = None) -> None:
        if self._rng.random() < 0.015:
            self.counts["requests"] += 1
            try:
                self.engine.submit(self._requests.refused(list(self._open), self._open.__contains__))
                self.faults.append("a request that cannot be served was taken")
            except ModelError:
                self.counts["refused"] += 1
        for request in self._requests.group(self._open.__contains__, name=name):
            budget = request.params.thinking_budget
            self.engine.submit(request)
            self.counts["requests"] += 1
            self._open[request.id] = Open(request, math.inf if budget is None else budget)

    def _disturb(self) -> None:
        """What callers do between two steps."""
        rng = self._rng
        if rng.random() < 0.2 and self._open:
            name = str(rng.choice(list(self._open)))
            self._abort(name)
            if rng.random() < 0.5:
                self._submit(name)
        if rng.random() < 0.2 and self._open:
            self._change_budget(str(rng.choice(list(self._open))))
        if rng.random() < 0.004:
            self._load()
        if rng.random() < 0.01:
            self.engine.speculation = None if self.engine.speculation else self._speculation
        if rng.random() < 0.01:
            self._refusals = int(rng.choice([1, 1, 2, 8]))
        if self.engine.abort("nobody") or self.engine.set_budget("nobody", 3):
            self.faults.append("a request that does not exist was found")

    def _change_budget(self, name: str) -> None:
        one = self._open[name]
        one.changed = True
        if self._rng.random() < 0.3:
            done = self.engine.finish_thinking(name)
        else:
            budget = int(self._rng.integers(0, 12)) if self._rng.random() < 0.9 else None
            one.most_budget = max(one.most_budget, math.inf if budget is None else budget)
            done = self.engine.set_budget(name, budget)
        self.counts["budgets changed"] += 1
        if not done:
            self.faults.append(f"{name} is unfinished and was not found")

    def _abort(self, name: str) -> None:
        one = self._open.pop(name)
        completion = self.engine.abort(name)
        self.counts["aborted"] += 1
        if completion is None:
            self.faults.append(f"{name} is unfinished and could not be taken out")
            return
        seen = one.tokens
        if completion.tokens[: len(seen)] != seen:
            self.faults.append(f"{name} was taken out with other tokens than it had shown")
        self._compare(one, completion)

    def _load(self) -> None:
        """Other weights; who has begun goes on with them, and is not what it would be alone."""
        recompute = bool(self._rng.random() < 0.6)
        rows, queue = self.engine.rows, self.engine.scheduler.queue
        for name, one in self._open.items():
            row, entry = rows.index.get(name), queue.get(name)
            begun = entry is not None and entry.resumed is not None
            if row is not None:
                begun = bool(rows.state["total"][row] > rows.state["prompt"][row]) or not recompute
            one.changed |= begun
        self._weights = int(self._rng.integers(WEIGHTS))
        self.engine.load(self._models[self._weights], recompute=recompute)

    def _step(self) -> None:
        self._now += 1.0
        self.counts["steps"] += 1
        for piece in self.engine.step():
            one = self._open.get(piece.id)
            if one is None:
                self.faults.append(f"a piece of {piece.id}, which has ended")
                continue
            one.pieces.append(piece)
            if piece.finish_reason is not None:
                del self._open[piece.id]
                self._ended(one, piece)
        if self.counts["steps"] % CHECKED == 0:
            self._check()

    # ------------------------------------------------------------ what has to hold

    def _ended(self, one: Open, last: Piece) -> None:
        params, tokens = one.request.params, one.tokens
        reason = last.finish_reason
        assert reason is not None
        self.counts[f"ended: {reason}"] += 1
        self.counts["tokens"] += len(tokens)
        self.counts["prompts that were known in part"] += last.cached_tokens > 0
        self.counts["prompts that another computed"] += last.cached_tokens == len(one.request.tokens)
        self.counts["stop sentences"] += any(any(piece.forced) for piece in one.pieces)
        at_limit = len(tokens) == params.max_tokens
        if len(tokens) > params.max_tokens or (reason == "length" and not at_limit):
            self.faults.append(f"{one.request.id} has {len(tokens)} tokens, ended by {reason}")
        if last.reasoning_tokens > one.most_budget:
            self.faults.append(f"{one.request.id} thought {last.reasoning_tokens} of {one.most_budget}")
        if reason == "error":
            self._failed(last.error or "")
        self._compare(one, _joined(one.pieces))

    def _failed(self, error: str) -> None:
        for sign, name in (("NaN", "NaN"), ("no memory", "no memory"), ("grammar", "no token")):
            if sign in error:
                self.counts[f"error: {name}"] += 1
                return
        self.faults.append(f"an error that nobody expects: {error}")

    def _compare(self, one: Open, found: Completion) -> None:
        """Now and then: with the same request alone."""
        if one.changed or self._rng.random() * self._sampled >= 1:
            return
        request = Request(one.request.id, one.request.tokens, one.request.params)
        [alone] = self._alone[self._weights].run([request])
        self.counts["compared"] += 1
        ends_early = found.finish_reason in ("abort", "deadline") or "no memory" in (found.error or "")
        wrong = differences(found, alone, 0.0 if self._native else 1e-4, whole=not ends_early)
        if wrong:
            self.faults.append(f"{one.request}: {wrong} differ from the request's own, alone")

    def _check(self) -> None:
        """The books of pages and names."""
        engine, rows = self.engine, self.engine.rows
        try:
            engine.scheduler.check()
        except AssertionError as error:
            self.faults.append(str(error))
        names = {*rows.index, *(entry.request.id for entry in engine.scheduler.queue)}
        if names != self._open.keys() or engine._live != names:  # noqa: SLF001 - what a leak would be of
            self.faults.append(f"{len(names)} requests are served, {len(self._open)} are unfinished")
        self.counts["checks"] += 1

    def _empty(self) -> None:
        """Nothing is left of requests that have ended."""
        self._check()
        engine, scheduler = self.engine, self.engine.scheduler
        left = {
            "pages held": engine.pool.num_held,
            "rows": engine.num_running,
            "waiting": engine.num_waiting,
            "live": len(engine._live),  # noqa: SLF001
            "pieces": len(engine._finished),  # noqa: SLF001
            "leaders": len(scheduler._leaders) + len(scheduler._followers),  # noqa: SLF001
            "deadlines": len(scheduler.queue.expired(math.inf)),
        }
        self.faults += [f"{count} {name} are left of nothing" for name, count in left.items() if count]

    # ------------------------------------------------------------ inside

    def _runner(self, model: Any) -> Runner:
        return NativeRunner(model) if self._native else TorchRunner(model)

    def _guesser(self) -> FirstOf:
        smaller = replace(CONFIG, hidden_size=16, num_layers=1, intermediate_size=16)
        draft = self._runner(model_of(9, smaller, self._dtype, broken=self._native))
        return FirstOf(Lookup(), DraftModel(draft, cache_tokens=16 * PAGE, step_tokens=64))

    def _run(self, batch: StepBatch) -> StepOutput:
        """The runner's, while there is memory."""
        if self._refusals:
            self._refusals -= 1
            self.counts["memory refused"] += 1
            raise MemoryError("for the soak's sake")
        return self._compute(batch)


def _joined(pieces: Sequence[Piece]) -> Completion:
    """The reply that pieces make."""
    last = pieces[-1]
    assert last.finish_reason is not None
    return Completion(
        tokens=[token for piece in pieces for token in piece.tokens],
        logprobs=[value for piece in pieces for value in piece.logprobs or ()],
        forced=[flag for piece in pieces for flag in piece.forced],
        finish_reason=last.finish_reason,
        num_reasoning_tokens=last.reasoning_tokens,
        top_logprobs=[top for piece in pieces for top in piece.top_logprobs or ()],
        prompt_logprobs=next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs), []),
        stopped_at=last.stopped_at,
        error=last.error,
    )


def differences(found: Completion, alone: Completion, tolerance: float, *, whole: bool) -> list[str]:
    """The fields in which a reply is not the other one; not `whole`: its beginning."""
    wrong = []
    for name in ("tokens", "forced", "logprobs", "top_logprobs", "prompt_logprobs"):
        ours, theirs = getattr(found, name), getattr(alone, name)
        if not whole:
            theirs = theirs[: len(ours)]
        if not _alike(ours, theirs, tolerance):
            wrong.append(name)
    for name in ("finish_reason", "num_reasoning_tokens", "stopped_at", "error"):
        if whole and getattr(found, name) != getattr(alone, name):
            wrong.append(name)
    return wrong


def _alike(ours: Any, theirs: Any, tolerance: float) -> bool:
    """Equal, NaN to NaN too; numbers within the tolerance."""
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_alike, ours, theirs, [tolerance] * len(ours)))
    if isinstance(ours, float):
        return ours == theirs or abs(ours - theirs) <= tolerance or (ours != ours and theirs != theirs)
    return bool(ours == theirs)
