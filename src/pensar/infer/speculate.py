"""Speculation: guesses of several tokens a row that one pass of the model confirms or refuses.

The token at index i of a reply is a function of its logits, the request's seed and i (pensar.infer.sampling). A pass
over a text and its guesses gives the logits behind each of them; every position is drawn as it would have been, and a
guess is kept while it is what was drawn. So a reply is the same with guesses and without, whatever they are.
Shape legend: R running rows, A of them that guesses are made for, D hidden.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from pensar.base.errors import ConfigError
from pensar.infer.budget import BEGINNING, NO_BUDGET, THINKING, Bools
from pensar.infer.drafts.draft_model import DraftModel
from pensar.infer.drafts.head import MOST_ENTRIES, HeadDrafts
from pensar.infer.drafts.lengths import Lengths
from pensar.infer.drafts.lookup import Lookup
from pensar.infer.drafts.proposer import Asked, FirstOf, Proposer, States
from pensar.infer.request import Completion, Ints
from pensar.infer.rows import RunningRows
from pensar.infer.runners import runner_for
from pensar.infer.scheduler import Plan, Scheduler
from pensar.infer.step import StepOutput
from pensar.infer.storage import is_out_of_memory
from pensar.model.draft_head import DraftHead
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model

MAX_DRAFTS = 8
REST = 8
"""Steps before guesses are thought of again, where none pay for those that run."""


class Acceptance(msgspec.Struct):
    """What became of guesses."""

    passes: int = 0
    """Steps of rows that had guesses."""
    tried: list[int] = msgspec.field(default_factory=list)
    """How often there was a first guess, a second, and so on."""
    kept: list[int] = msgspec.field(default_factory=list)
    """How often it and all before it were kept."""

    def add(self, tried: int, kept: int) -> None:
        while len(self.tried) < tried:
            self.tried.append(0)
            self.kept.append(0)
        self.passes += 1
        for place in range(tried):
            self.tried[place] += 1
            self.kept[place] += place < kept

    @property
    def tokens_per_pass(self) -> float:
        """Of rows that had guesses: those kept and the one that every pass draws."""
        return 1 + sum(self.kept) / self.passes if self.passes else 1.0


@dataclass(frozen=True, slots=True)
class _Step:
    """What a step was before its tokens were added."""

    names: list[str]
    """Of all rows."""
    prompts: Ints
    totals: Ints
    computed: Ints
    guesses: dict[int, Ints]
    """By row."""
    alone: bool
    """Whether every row computes one token and its guesses: no chunk of a prompt."""
    num_tokens: int
    depth: int
    drafted_seconds: float
    began: float


@dataclass(slots=True)
class Speculation:
    """Stands between an engine and its scheduler: `plan` in place of the scheduler's own, and `committed` afterwards.

    With `adaptive` the number of guesses of a row is what pays, by what was kept and by the time of passes; else it
    is `max_drafts`.
    """

    proposer: Proposer
    max_drafts: int = MAX_DRAFTS
    adaptive: bool = True
    clock: Callable[[], float] = time.perf_counter
    acceptance: Acceptance = field(default_factory=Acceptance)
    lengths: Lengths = field(init=False)
    _known: dict[str, int] = field(default_factory=dict, init=False)
    """Request id -> its number in the order of arrival."""
    _guesses: dict[int, Ints] = field(default_factory=dict, init=False)
    _step: _Step | None = field(default=None, init=False)
    _arrivals: bytes = field(default=b"", init=False)
    _rest: int = field(default=0, init=False)
    _steps: int = field(default=1, init=False)
    """From the last choice of lengths to the next."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_drafts <= MOST_ENTRIES:
            raise ConfigError(f"max_drafts is {self.max_drafts}; give 1 to {MOST_ENTRIES}")
        self.lengths = Lengths(self.max_drafts)

    def plan(self, scheduler: Scheduler) -> Plan:
        """Makes guesses, writes them behind the texts and plans the next step with them."""
        rows = scheduler.rows
        began = self.clock()
        if self._changed(rows):
            self._rest = 0
        drafts = None
        if self._rest:
            self._rest -= 1
            self._guesses = {}
        else:
            drafts = self._propose(rows, scheduler.step_tokens)
        drafted = self.clock()
        plan = scheduler.plan(drafts)
        state = rows.state[: rows.num]
        self._step = _Step(
            names=[request.id for request in rows.requests],
            prompts=state["prompt"].copy(),
            totals=state["total"].copy(),
            computed=state["computed"].copy(),
            guesses=self._guesses,
            alone=bool((plan.counts - plan.drafts == 1).all()),
            num_tokens=int(plan.counts.sum()),
            depth=int(plan.drafts.max(initial=0)),
            drafted_seconds=drafted - began,
            began=self.clock(),
        )
        return plan

    def committed(
        self,
        rows: RunningRows,
        plan: Plan,
        output: StepOutput,
        finished: Mapping[str, tuple[Completion, int]],
    ) -> None:
        """Learns from a step that has been computed and whose tokens have been added; `plan` is as it was computed.

        `finished` holds the replies that the step has ended, by request id.
        """
        step, self._step = self._step, None
        assert step is not None, "plan comes first"
        self._time(step)
        if not step.depth and not self.proposer.wants_states:
            return
        ends = np.cumsum(plan.wanted)
        states: list[States] = []
        for at, (row, tried) in enumerate(zip(plan.rows.tolist(), plan.drafts.tolist(), strict=True)):
            name = step.names[row]
            now = rows.index.get(name)
            kept = 0
            if tried:
                kept = _kept(step.guesses[row][:tried], *_added(rows, now, finished.get(name), step, row))
                self.acceptance.add(tried, kept)
                self.lengths.learn(name, tried, kept)
            if self.proposer.wants_states and now is not None and rows.state["total"][now] > step.totals[row]:
                # The last wanted states are those of the text's end and of its guesses.
                first = int(ends[at]) - tried - 1
                position = int(step.computed[row] + plan.counts[at]) - tried - 1
                states.append(States(name, position, output.hidden_SD[first : first + 1 + kept]))
        if states:
            self.proposer.observe(rows, states)

    # ------------------------------------------------------------ inside

    def _propose(self, rows: RunningRows, step_tokens: int) -> Ints | None:
        """Guesses written behind the texts of `rows`; how many each row has."""
        self._guesses = {}
        most = self._most(rows)
        chosen = np.flatnonzero(most)
        if not len(chosen):
            return None
        names = [rows.requests[row].id for row in chosen.tolist()]
        room = (step_tokens - rows.num) // 2
        if self.adaptive:
            others = rows.num - len(chosen)
            counts = self.lengths.choose(names, most[chosen], others, max(0, room), self._steps)
            self._steps = 1
            if not counts.any():
                self._rest, self._steps = REST, 1 + REST
        else:
            counts = np.minimum(most[chosen], max(0, room) // len(chosen))
        chosen, counts = chosen[counts > 0], counts[counts > 0]
        if not len(chosen):
            return None
        guesses = self._guessed(Asked(rows, chosen, counts))
        drafts = np.zeros(rows.num, np.int64)
        for row, count, guess in zip(chosen.tolist(), counts.tolist(), guesses, strict=True):
            guess = self._sensible(rows, row, guess[:count])
            total = int(rows.state["total"][row])
            rows.tokens[row, total : total + len(guess)] = guess
            drafts[row], self._guesses[row] = len(guess), guess
        return drafts if drafts.any() else None

    def _most(self, rows: RunningRows) -> Ints:
        """[R] guesses that could be kept: one more token is drawn, and a thinking budget ends the thinking."""
        state = rows.state[: rows.num]
        single = (state["total"] - state["computed"] == 1) & ~state["follows"] & ~state["every"]
        most = np.minimum(state["limit"] - state["total"] - 1, self.max_drafts)
        thinks = (state["phase"] <= THINKING) & (state["budget"] != NO_BUDGET)
        # Before the block there may be its tag and a blank, which no budget counts.
        left = np.where(thinks, state["budget"] - state["reasoning"], self.max_drafts)
        left += np.where(thinks & (state["phase"] == BEGINNING), 2, 0)
        most = np.where(single, np.minimum(most, left), 0)
        return np.maximum(most, 0)

    def _guessed(self, asked: Asked) -> list[Ints]:
        """The guesses: what a grammar leaves no choice about, and for the other rows the proposer's."""
        guesses = [np.zeros(0, np.int64)] * len(asked.chosen)
        for index, row in enumerate(asked.chosen.tolist() if any(asked.rows.constraints) else ()):
            if (constraint := asked.rows.constraints[row]) is not None:
                guesses[index] = np.asarray(constraint.forced(), np.int64)
        left = [index for index, guess in enumerate(guesses) if not len(guess)]
        if not left:
            return guesses
        try:
            found = self.proposer.propose(Asked(asked.rows, asked.chosen[left], asked.counts[left]))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            for name in list(self._known):
                self.proposer.forget(name)
            return guesses
        for index, guess in zip(left, found, strict=True):
            guesses[index] = guess
        return guesses

    def _sensible(self, rows: RunningRows, row: int, guess: Ints) -> Ints:
        """The guesses up to a token that ends the reply, and before one that its grammar does not allow."""
        stops = np.flatnonzero(rows.stopped(np.full(len(guess), row), guess))
        if len(stops):
            guess = guess[: stops[0] + 1]
        constraint = rows.constraints[row]
        if constraint is None:
            return guess
        count = 0
        for token in guess.tolist():
            if not constraint.allows(token):
                break
            constraint.accept(token)
            count += 1
        constraint.rollback(count)
        return guess[:count]

    def _time(self, step: _Step) -> None:
        if not step.alone:
            return
        self.lengths.passes.add(step.num_tokens, self.clock() - step.began)
        if step.depth:
            self.lengths.drafting.add(step.depth, step.drafted_seconds)

    def _changed(self, rows: RunningRows) -> bool:
        """Whether others run than in the step before; who has gone is forgotten.

        Ids may be used again: a request is the one that arrived then.
        """
        arrivals = rows.state["arrival"][: rows.num].tobytes()
        if arrivals == self._arrivals:
            return False
        self._arrivals = arrivals
        numbers = rows.state["arrival"][: rows.num].tolist()
        running = {request.id: number for request, number in zip(rows.requests, numbers, strict=True)}
        for name, number in self._known.items():
            if running.get(name) != number:
                self.proposer.forget(name)
                self.lengths.forget(name)
        self._known = running
        return True


def _added(
    rows: RunningRows, now: int | None, finished: tuple[Completion, int] | None, step: _Step, row: int
) -> tuple[Ints, Bools]:
    """What a step has added to a text, and which of it was forced."""
    total = int(step.totals[row])
    if now is not None:
        added = slice(total, int(rows.state["total"][now]))
        return rows.tokens[now, added], rows.forced[now, added]
    if finished is None:  # failed, or taken out
        return np.zeros(0, np.int64), np.zeros(0, np.bool_)
    reply, start = finished[0], total - int(step.prompts[row])
    return np.asarray(reply.tokens[start:], np.int64), np.asarray(reply.forced[start:], np.bool_)


def _kept(guess: Ints, added: Ints, forced: Bools) -> int:
    """Guesses that became the text; a stop sentence in their place is none of them."""
    num = min(len(guess), len(added))
    wrong = (guess[:num] != added[:num]) | forced[:num]
    return int(np.argmax(wrong)) if wrong.any() else num


def speculation(
    model: Qwen3,
    *,
    lookup: bool = False,
    head: Path | None = None,
    draft: Path | None = None,
    slots: int = 64,
    max_drafts: int = MAX_DRAFTS,
) -> Speculation | None:
    """What a server is asked for: copying from the text, and for what it does not find a head's or a model's guesses.

    `head` is the folder of a draft head, `draft` that of a smaller model. None where nothing is asked for. Raises
    ConfigError for both at once and for a draft model with another vocabulary, ModelError for what cannot be opened.
    """
    if head is not None and draft is not None:
        raise ConfigError(
            f"a draft head ({head}) and a draft model ({draft}) are two guessers; give one of them"
        )
    proposers: list[Proposer] = [Lookup(shortest=3)] if lookup else []
    if head is not None:
        proposers.append(HeadDrafts(DraftHead.load(head, model), model))
    if draft is not None:
        weight = model.model.embed_tokens.weight
        smaller = load_model(draft, weight.device, weight.dtype)
        if smaller.config.vocab_size != model.config.vocab_size:
            raise ConfigError(
                f"the draft model of {draft} knows {smaller.config.vocab_size:,} tokens, the model "
                f"{model.config.vocab_size:,}; both need the same tokenizer"
            )
        proposers.append(DraftModel(runner_for(smaller), slots=slots))
    if not proposers:
        return None
    return Speculation(FirstOf(*proposers) if len(proposers) > 1 else proposers[0], max_drafts)
