"""Engine: requests in, pieces out; every step computes some tokens of all that run and draws what follows.

The same engine serves users and makes rollouts: `load` swaps the weights in place, and the log-probabilities that it
reports are those of the model's own distribution, which is what a trainer computes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from pensar.base.errors import ConfigError, ModelError
from pensar.base.ranks import World
from pensar.infer.adapters import checked_name, read_adapter
from pensar.infer.adaptive import AdaptiveBudget
from pensar.infer.budget import ANSWER, NO_BUDGET, Thinking
from pensar.infer.commit import Commit
from pensar.infer.constraint import Constraints
from pensar.infer.footprint import Footprint, footprint
from pensar.infer.pages import PagePool
from pensar.infer.queue import Entry
from pensar.infer.report import new_pieces
from pensar.infer.request import (
    Completion,
    FinishReason,
    Ints,
    Piece,
    Request,
    SamplingParams,
    checked_prompt,
    known_part,
    piece_of,
)
from pensar.infer.rows import RunningRows
from pensar.infer.runners import runner_for
from pensar.infer.scheduler import Plan, Scheduler
from pensar.infer.speculate import Speculation
from pensar.infer.spill import Spill, SpillConfig
from pensar.infer.step import PAGE, Runner, StepOutput
from pensar.infer.stops import StopMatcher
from pensar.infer.storage import cache_pages, is_out_of_memory, merged
from pensar.infer.sync import broadcast_weights, weights_stamp
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import check_tokenizer
from pensar.text.tokenizer import THINK, Tokenizer

__all__ = ["Completion", "Engine", "Piece", "Request", "SamplingParams"]

STEP_TOKENS = 2_048
"""Tokens of one step, so that running replies are not held up by long prompts."""


class Engine:
    """Continuous batching over one model; not thread-safe.

    `slots` replies run at once, further requests wait. A request may use up to `max_tokens_per_slot` positions (at
    most and by default the model's max_positions); `cache_tokens` is room for the texts of all together, by default
    what the slots can fill, within a quarter of the memory. A step computes `step_tokens` tokens, prompts in chunks.
    With `share` requests that begin alike compute the beginning once; `speculation` guesses tokens ahead, which changes
    the speed of a reply and not the reply; what the cache has no more room for goes to the `spill`. Without a tokenizer
    nothing but stop_ids and max_tokens ends a reply and there is no thinking.
    """

    def __init__(
        self,
        model: Qwen3 | Runner,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 64,
        max_tokens_per_slot: int | None = None,
        cache_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS,
        share: bool = True,
        spill: SpillConfig | None = None,
        speculation: Speculation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"slots is {slots}; an engine needs at least 1")
        if step_tokens < slots:
            raise ConfigError(
                f"step_tokens {step_tokens} is less than slots {slots}; every running reply needs one token a step"
            )
        if spill is not None and not share:
            raise ConfigError("a spill keeps pages that requests share; leave share on, or the spill out")
        self.runner: Runner = runner_for(model) if isinstance(model, Qwen3) else model
        config = self.runner.config
        end_ids: tuple[int, ...] = ()
        self._tokenizer, self._thinking = tokenizer, None
        if tokenizer is not None:
            check_tokenizer(config, tokenizer.vocab_size)
            end_ids = (tokenizer.eos_id, tokenizer.pad_id)
            self._thinking = Thinking(tokenizer) if THINK in tokenizer.control_tokens else None
        self.constraints = Constraints(config.vocab_size, tokenizer, self._thinking, end_ids)
        self.slots = slots
        self.max_positions = min(config.max_positions, max_tokens_per_slot or config.max_positions)
        self.pool = PagePool(cache_pages(self.runner, slots, self.max_positions, cache_tokens))
        self.rows = RunningRows(slots, self._thinking, end_ids)
        self.scheduler = Scheduler(
            self.runner, self.rows, self.pool, slots=slots, step_tokens=step_tokens, share=share
        )
        if spill is not None:
            self.pool.spill = Spill(self.runner, spill, self.scheduler.reserve)
        self.version = 0
        """How often new weights were loaded."""
        self.speculation = speculation
        self.adaptive: AdaptiveBudget | None = None
        """What the model has learned of how much thinking a question deserves."""
        self._stamp = weights_stamp(self.runner.model)
        self._clock = clock
        self._arrivals = 0
        self._live: set[str] = set()
        self._finished: dict[str, tuple[Completion, int]] = {}
        self._commit = Commit(self.rows, self.scheduler, self._thinking, self._retire)

    @property
    def model(self) -> Qwen3:
        """The module that the runner computes with."""
        return self.runner.model

    @property
    def num_running(self) -> int:
        return self.rows.num

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.queue)

    @property
    def footprint(self) -> Footprint:
        """The memory that it takes when every page is in use."""
        return footprint(self.runner, self.pool, slots=self.slots, step_tokens=self.scheduler.step_tokens)

    # ------------------------------------------------------------ requests

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ModelError, naming value and limit, for one that the model cannot serve."""
        prompt = checked_prompt(request, self.runner.config.vocab_size, self.max_positions)
        self._check(request, len(prompt))
        if not self._live and weights_stamp(self.runner.model) != self._stamp:
            self.load(self.runner.model)
        entry = Entry(request, prompt, self._arrivals)
        entry.constraint, entry.stops = self.constraints.of(request, prompt), self._stops_of(request, prompt)
        if request.timeout_seconds is not None:
            entry.deadline = self._clock() + request.timeout_seconds
        self._arrivals += 1
        self._live.add(request.id)
        self.scheduler.queue.push(entry)

    def step(self) -> list[Piece]:
        """Computes one step and returns what is new; a request's failure ends it alone.

        A reply's stop sentence arrives in one piece; where log-probabilities are asked for, with the step that
        knows them.
        """
        self._advance()
        pieces = [
            piece_of(name, completion, reported, completion.finish_reason)
            for name, (completion, reported) in self._finished.items()
        ]
        self._finished.clear()
        return pieces + new_pieces(self.rows)

    def abort(self, name: str) -> Completion | None:
        """Takes out a request and returns what it has so far; None where no such request is unfinished."""
        if self.scheduler.queue.get(name) is not None:
            entry = self.scheduler.queue.remove(name)
            self._live.discard(name)
            return entry.ended("abort")
        row = self.rows.index.get(name)
        if row is not None:
            completion = known_part(self.rows.completion(row, "abort"))
            self._live.discard(name)
            self.scheduler.release(row)
            return completion
        self._finished.pop(name, None)
        return None

    def set_budget(self, name: str, budget: int | None) -> bool:
        """Changes the thinking budget of an unfinished request; False where there is no such request.

        A budget that is spent already closes the thinking with the next token.
        """
        if budget is not None and (budget < 0 or self._thinking is None):
            raise ModelError(
                f"request {name}: thinking_budget {budget} must be at least 0, with a tokenizer that knows {THINK}"
            )
        row = self.rows.index.get(name)
        value = NO_BUDGET if budget is None else budget
        if row is not None:
            self.rows.state["budget"][row] = value
            return True
        entry = self.scheduler.queue.get(name)
        if entry is None:
            return False
        entry.budget = value
        return True

    def finish_thinking(self, name: str) -> bool:
        """Asks for the answer now: as if the budget were what has been thought so far."""
        row = self.rows.index.get(name)
        if row is None or self._thinking is None:
            return self.set_budget(name, 0) if self._thinking is not None else False
        self.rows.state["budget"][row] = self.rows.state["reasoning"][row]
        return True

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Serves `requests` to their ends; one that the engine refuses has finish_reason "error" and its reason.

        Requests that were submitted before go on meanwhile and are reported by the next `step`.
        """
        results: list[Completion | None] = [None] * len(requests)
        open_requests: dict[str, int] = {}
        for index, request in enumerate(requests):
            try:
                self.submit(request)
                open_requests[request.id] = index
            except ModelError as error:
                results[index] = Completion(
                    tokens=[], logprobs=[], forced=[], finish_reason="error", error=str(error)
                )
        try:
            while open_requests:
                self._advance()
                for name in [name for name in self._finished if name in open_requests]:
                    results[open_requests.pop(name)] = self._finished.pop(name)[0]
        finally:
            for name in open_requests:  # only when a step raised or was interrupted
                self.abort(name)
        return [result for result in results if result is not None]

    # ------------------------------------------------------------ weights

    def load(self, weights: Mapping[str, Tensor] | Qwen3, *, recompute: bool = True) -> None:
        """Takes weights of the same shapes in place, between two steps; tokens say which version they were drawn from.

        With `recompute` what runs goes on as if it had always had them: its texts are computed again. Without, it
        keeps the keys and values that the old weights made. An engine that has nothing to do notices by itself that
        the weights of its own module have changed. Raises ModelError where names or shapes differ, before
        anything is changed.
        """
        self.runner.load(weights)
        self.version += 1
        self._stamp = weights_stamp(self.runner.model)
        if recompute:
            self.scheduler.restart()
        else:
            self.pool.disown()

    def receive(self, world: World, source: int = 0, *, recompute: bool = True) -> None:
        """`load` of the weights that rank `source` has in its own model.

        Every rank makes the call, the sender by `broadcast_weights(model, world, source)` where it has no engine.
        """
        broadcast_weights(self.runner.model, world, source)
        self.load(self.runner.model, recompute=recompute)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Requests may ask for the LoRA or DoRA adapter in `folder`, in PEFT's format, from now on.

        Raises ModelError, ConfigError or DataError where it is not one of this model, and changes nothing then.
        """
        checked_name(name, self.scheduler.adapters)
        number = next(
            n for n in range(len(self.scheduler.adapters) + 1) if n not in self.scheduler.adapters.values()
        )
        self.runner.set_adapter(number, read_adapter(self.runner.model, folder))
        self.scheduler.adapters[name] = number

    def unload_adapter(self, name: str) -> None:
        """Raises ModelError where there is no such adapter, or an unfinished request uses it."""
        if name not in self.scheduler.adapters:
            raise ModelError(
                f"no adapter {name!r} is loaded; loaded: {', '.join(self.scheduler.adapters) or 'none'}"
            )
        requests = [*self.rows.requests, *(entry.request for entry in self.scheduler.queue)]
        using = sum(request.adapter == name for request in requests)
        if using:
            raise ModelError(
                f"adapter {name!r} is used by {using} unfinished requests; wait for them or abort them"
            )
        self.runner.set_adapter(self.scheduler.adapters.pop(name), None)
        # Another adapter may come by this name: its texts are other keys and values.
        self.pool.forget_all()

    # ------------------------------------------------------------ a step

    def _advance(self) -> None:
        self._expire()
        self.scheduler.admit()
        speculation = self.speculation
        plan = self.scheduler.plan() if speculation is None else speculation.plan(self.scheduler)
        if not len(plan.rows):
            return
        plan, output, failed = self._compute(plan)
        broken = [(self.rows.requests[row].id, reason) for row, reason in failed]
        if output is not None:
            self._commit(plan, output, self.version, self.adaptive)
            if speculation is not None:
                speculation.committed(self.rows, plan, output, self._finished)
        for name, reason in broken:
            self._retire(self.rows.index[name], "error", reason, False)

    def _compute(self, plan: Plan) -> tuple[Plan, StepOutput | None, list[tuple[int, str]]]:
        """The plan as it could be computed, its output, and the rows that no memory was left for, with the reason."""
        try:
            return plan, self.runner.run(self.scheduler.batch(plan)), []
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        if len(plan.rows) == 1:
            name = self.rows.requests[int(plan.rows[0])].id
            text = f"no memory to compute {int(plan.counts[0]):,} tokens of request {name} ({reason}); shorten it"
            return plan.part(slice(0, 0)), None, [(int(plan.rows[0]), text)]
        half = len(plan.rows) // 2
        parts = [self._compute(plan.part(slice(0, half))), self._compute(plan.part(slice(half, None)))]
        whole, output = merged([(part, output) for part, output, _ in parts])
        return whole, output, parts[0][2] + parts[1][2]

    def _expire(self) -> None:
        now = self._clock()
        for entry in self.scheduler.queue.expired(now):
            self._finished[entry.request.id] = (entry.ended("deadline"), entry.reported)
            self._live.discard(entry.request.id)
        deadlines = self.rows.state["deadline"][: self.rows.num]
        if deadlines.min(initial=np.inf) <= now:
            for row in np.flatnonzero(deadlines <= now)[::-1].tolist():
                self._retire(row, "deadline", None, False)

    def _retire(self, row: int, reason: FinishReason, error: str | None, broken: bool) -> None:
        """Ends a row's reply; its place is filled by the last row."""
        name = self.rows.requests[row].id
        completion = known_part(self.rows.completion(row, reason, error=error))
        reported = int(self.rows.state["reported"][row] - self.rows.state["prompt"][row])
        self._finished[name] = (completion, reported)
        self._live.discard(name)
        self.scheduler.release(row, broken=broken)

    def _stops_of(self, request: Request, prompt: Ints) -> StopMatcher | None:
        if not request.params.stop:
            return None
        if self._tokenizer is None:
            raise ModelError(
                f"request {request.id} has stop strings, which need an engine with a tokenizer; use stop_ids"
            )
        phase = ANSWER if self._thinking is None else self._thinking.phase_of(prompt)
        return StopMatcher(self._tokenizer, request.params.stop, self._thinking, phase)

    def _check(self, request: Request, length: int) -> None:
        if request.id in self._live:
            raise ModelError(f"request id {request.id!r} is in use by an unfinished request; choose another")
        params = request.params
        if params.thinking_budget is not None and self._thinking is None:
            raise ModelError(
                f"request {request.id} has thinking_budget {params.thinking_budget}, but the tokenizer has no "
                f"{THINK}; leave the budget out"
            )
        if params.adaptive_budget and (self.adaptive is None or self._thinking is None):
            raise ModelError(
                f"request {request.id} has adaptive_budget {params.adaptive_budget}, but the model has no learned "
                "thinking budgets; give thinking_budget instead"
            )
        if request.adapter and request.adapter not in self.scheduler.adapters:
            known = ", ".join(self.scheduler.adapters) or "none"
            raise ModelError(f"request {request.id} asks for adapter {request.adapter!r}; loaded: {known}")
        if request.timeout_seconds is not None and not request.timeout_seconds > 0:
            raise ModelError(
                f"request {request.id} has timeout_seconds {request.timeout_seconds}; it must be above 0"
            )
        room = (self.pool.num_pages - 1) * PAGE
        if length + params.max_tokens > room:
            raise ModelError(
                f"request {request.id} needs {length + params.max_tokens:,} tokens of cache, there is room for "
                f"{room:,}; lower max_tokens or make the engine with more cache_tokens"
            )
