"""Commit: what becomes of a computed step: scores of given tokens, draws of new ones, and the ends of replies.

The token at index i of a reply is a function of its logits, the request's seed and i. So drafts need no rule of their
own: every position is drawn as it would have been, and a draft is kept while it equals the draw.
Shape legend: A rows that a token is drawn for, M draws (A and one per draft), S rows of logits, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pensar.infer.adaptive import AdaptiveBudget
from pensar.infer.budget import Bools, Thinking
from pensar.infer.constraint import apply_all
from pensar.infer.request import FinishReason, Ints, TopLogprobs
from pensar.infer.rows import RunningRows
from pensar.infer.sampling import Rules, logprobs, rules_of, sample, top_logprobs, uniforms
from pensar.infer.scheduler import Plan, Scheduler
from pensar.infer.step import StepOutput

Retire = Callable[[int, FinishReason, str | None, bool], None]
"""(row, why its reply ends, the error if it is one, whether its pages may hold NaN)"""


@dataclass(frozen=True, slots=True)
class _Scores:
    """The model's logits at the places of draws, and the largest of each, where nothing was added before the draw."""

    raw_MV: Tensor
    top_M: Tensor | None

    def of(self, ids: Ints, at: Ints) -> tuple[Tensor, npt.NDArray[np.float32]]:
        """Logits and log-probabilities of `ids` at some places."""
        raw_MV, top_M = self.raw_MV, self.top_M
        if len(at) != len(raw_MV):
            index = torch.from_numpy(at).to(raw_MV.device)
            raw_MV, top_M = raw_MV[index], None if top_M is None else top_M[index]
        return raw_MV, logprobs(raw_MV, torch.from_numpy(ids).to(raw_MV.device), top_M).cpu().numpy()


class Commit:
    """Called once a step, with what the runner computed of a plan."""

    def __init__(
        self, rows: RunningRows, scheduler: Scheduler, thinking: Thinking | None, retire: Retire
    ) -> None:
        self._rows, self._scheduler, self._thinking, self._retire = rows, scheduler, thinking, retire
        self._rules: tuple[Ints, Rules] | None = None
        self._ended: dict[int, tuple[FinishReason, str | None, bool]] = {}
        self._version = 0

    def __call__(
        self, plan: Plan, output: StepOutput, version: int, adaptive: AdaptiveBudget | None = None
    ) -> None:
        state = self._rows.state
        self._version, self._ended = version, {}
        self._scheduler.computed(plan)
        if plan.plain:
            rows_A, drafts_A, first_A = plan.rows, plan.drafts, plan.rows  # a row of logits each
        else:
            rows_A, drafts_A, first_A = self._complete(plan, output)
        joined, whom = self._scheduler.joined(rows_A)
        if len(joined):
            rows_A, first_A = np.concatenate((rows_A, joined)), np.concatenate((first_A, first_A[whom]))
            drafts_A = np.concatenate((drafts_A, np.zeros(len(joined), np.int64)))
        full = state["total"][rows_A] >= state["limit"][rows_A]
        if full.any():  # forced tokens were the last
            self._end(rows_A[full], "length")
            rows_A, first_A, drafts_A = rows_A[~full], first_A[~full], drafts_A[~full]
        if adaptive is not None:
            self._allot(rows_A, first_A, output.hidden_SD, adaptive)
        if len(rows_A):
            self._draw(rows_A, first_A, drafts_A, output.logits_SV)
        self._scheduler.publish()
        for row in sorted(self._ended, reverse=True):  # downwards: the last row fills a gap
            self._retire(row, *self._ended[row])

    def _complete(self, plan: Plan, output: StepOutput) -> tuple[Ints, Ints, Ints]:
        """Scores what is asked for, and says of the rows whose text is in the cache which they are, how many drafts
        stand behind it, and where their first logits are."""
        state = self._rows.state
        ends = np.cumsum(plan.wanted)
        every = np.flatnonzero(state["every"][plan.rows])
        for at in every.tolist():
            first = int(ends[at] - plan.wanted[at])
            self._score(int(plan.rows[at]), output.logits_SV[first : int(ends[at])])
        complete = np.flatnonzero(state["computed"][plan.rows] == state["total"][plan.rows])
        drafts_A = plan.drafts[complete]
        return plan.rows[complete], drafts_A, ends[complete] - drafts_A - 1

    def _allot(self, rows_A: Ints, first_A: Ints, hidden_SD: Tensor, adaptive: AdaptiveBudget) -> None:
        """Sets the budgets of replies that are about to begin."""
        state = self._rows.state
        begins = np.flatnonzero(state["total"][rows_A] == state["prompt"][rows_A])
        for at in begins.tolist():
            row = int(rows_A[at])
            share = self._rows.requests[row].params.adaptive_budget
            if share:
                budget = adaptive.budget(hidden_SD[int(first_A[at])], share)
                least = self._rows.requests[row].params.min_thinking
                state["budget"][row] = min(int(state["budget"][row]), max(least, budget))

    def _score(self, row: int, logits_SV: Tensor) -> None:
        """Log-probabilities of the tokens behind those that were computed, as far as they are given."""
        state = self._rows.state
        stop, total = int(state["computed"][row]), int(state["total"][row])
        start = stop - len(logits_SV)
        targets = self._rows.tokens[row, start + 1 : min(stop + 1, total)]
        if len(targets):
            known = logits_SV[: len(targets)]
            ids = torch.from_numpy(targets.copy()).to(known.device)
            self._rows.logprobs[row, start + 1 : start + 1 + len(targets)] = (
                logprobs(known, ids).cpu().numpy()
            )
            tops = self._rows.tops[row]
            place = start + 1 - self._rows.first_top(row)
            known = known[max(0, -place) :]
            if tops is not None and len(known):  # also what was told before: other weights may have done it
                place = max(0, place)
                tops[place : place + len(known)] = _likeliest(
                    known, self._rows.requests[row].params.top_logprobs
                )
        if stop == total:
            state["every"][row] = False

    def _draw(self, rows_A: Ints, first_A: Ints, drafts_A: Ints, logits_SV: Tensor) -> None:
        """One token for each row, and further ones as long as they are what was guessed."""
        state, most = self._rows.state, int(drafts_A.max())
        rows_M, source_M, offset_A = rows_A, first_A, np.arange(len(rows_A))
        index_M = state["total"][rows_A] - state["prompt"][rows_A]
        if most:
            rows_M = np.repeat(rows_A, drafts_A + 1)
            offset_A = np.cumsum(drafts_A + 1) - drafts_A - 1
            step_M = np.arange(len(rows_M)) - np.repeat(offset_A, drafts_A + 1)
            source_M = np.repeat(first_A, drafts_A + 1) + step_M
            index_M = np.repeat(index_M, drafts_A + 1) + step_M
        raw_MV = logits_SV
        in_order = source_M is rows_A or (np.diff(source_M) == 1).all()
        if len(source_M) != len(logits_SV) or not in_order:
            raw_MV = logits_SV[torch.from_numpy(source_M).to(logits_SV.device)]
        allowed_MV = self._constrained(rows_A, drafts_A, offset_A, raw_MV)
        rules, uniform = self._rules_of(rows_M, raw_MV.device), None
        if not rules.all_greedy:
            uniform = torch.from_numpy(uniforms(state["seed"][rows_M], index_M)).to(raw_MV.device)
        draw = sample(allowed_MV, rules, uniform, self._scheduler.runner.weigh)
        ids_M, sound_M = draw.ids.cpu().numpy(), draw.sound
        scores = _Scores(raw_MV, draw.top_N if allowed_MV is raw_MV else None)
        rows, at = rows_A, offset_A
        for turn in range(most + 1):
            ids, sound = ids_M[at], sound_M[at]
            if not sound.all():
                self._fail(rows[~sound], at[~sound], raw_MV)
            if turn == most:
                self._settle(rows, ids, sound, at, scores)
                break
            guesses = self._rows.tokens[rows, np.minimum(state["total"][rows], state["limit"][rows] - 1)]
            kept = self._settle(rows, ids, sound, at, scores)
            kept &= (drafts_A > turn) & (guesses == ids)
            rows, at, drafts_A = rows[kept], at[kept] + 1, drafts_A[kept]
            state["computed"][rows] += 1
            if not len(rows):
                break

    def _settle(self, rows: Ints, ids: Ints, sound: Bools, at: Ints, scores: _Scores) -> Bools:
        """Adds a drawn token to each row, or the stop sentence in its place; returns which rows may take another."""
        state = self._rows.state
        forced = np.zeros(len(ids), np.bool_)
        if self._thinking is not None:
            forced = self._thinking.spent(state, rows, ids) & sound
        if forced.any():
            assert self._thinking is not None
            self._note(rows, np.where(forced, self._thinking.stop_sentence[0], ids), at, scores)
            for row in rows[forced].tolist():
                self._force(row, self._thinking)
        else:
            self._note(rows, ids, at, scores)
        usual = sound & ~forced
        if not usual.all():
            rows, ids = rows[usual], ids[usual]
        stopped = self._rows.stopped(rows, ids)
        self._rows.append(rows, ids, self._version)
        if self._thinking is not None:
            self._thinking.count(state, rows, ids, stopped)
        if any(self._rows.constraints):
            for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
                if (constraint := self._rows.constraints[row]) is not None:
                    constraint.accept(token)
        if any(self._rows.stops):
            stopped |= self._spelled(rows, ids)
        ended = stopped | (state["total"][rows] >= state["limit"][rows])
        if ended.any():
            self._end(rows[ended & ~stopped], "length")
            self._end(rows[stopped], "stop")
        on = usual
        on[usual] = ~ended
        return on

    def _note(self, rows: Ints, ids: Ints, at: Ints, scores: _Scores) -> None:
        """Log-probabilities of the tokens that come next, where any row asks for them."""
        state = self._rows.state
        if not state["logprobs"][rows].any():
            return
        logits, values = scores.of(ids, at)
        self._rows.logprobs[rows, state["total"][rows]] = values
        if state["plain"][rows].all():
            return
        for index, row in enumerate(rows.tolist()):
            tops = self._rows.tops[row]
            if tops is not None:
                tops += _likeliest(logits[index : index + 1], self._rows.requests[row].params.top_logprobs)

    def _spelled(self, rows: Ints, ids: Ints) -> Bools:
        """Where a token completes a stop string."""
        found = np.zeros(len(rows), np.bool_)
        for index, (row, token) in enumerate(zip(rows.tolist(), ids.tolist(), strict=True)):
            matcher = self._rows.stops[row]
            found[index] = matcher is not None and matcher.feed([token]) is not None
        return found

    def _force(self, row: int, thinking: Thinking) -> None:
        """The stop sentence: computed by one pass like a part of a prompt, and then the answer begins."""
        state, rows = self._rows.state, self._rows
        count = rows.append_forced(row, thinking.stop_sentence, self._version)
        thinking.close(state, row)
        if (constraint := rows.constraints[row]) is not None:
            for token in thinking.stop_sentence[:count].tolist():
                constraint.accept(token)
        if (matcher := rows.stops[row]) is not None:
            matcher.feed(thinking.stop_sentence[:count].tolist())
        if state["logprobs"][row] and count > 1:
            state["every"][row] = True
        elif state["total"][row] >= state["limit"][row]:
            self._end(np.asarray([row]), "length")

    def _constrained(self, rows_A: Ints, drafts_A: Ints, offset_A: Ints, raw_MV: Tensor) -> Tensor:
        """The logits after what requests ask for beside plain rules, each draft taken to be right."""
        if not any(self._rows.constraints):
            return raw_MV
        chosen = [self._rows.constraints[row] for row in rows_A.tolist()]
        total_A = self._rows.state["total"][rows_A]
        drafts = [
            self._rows.tokens[row, total : total + count].tolist()
            for row, total, count in zip(rows_A.tolist(), total_A.tolist(), drafts_A.tolist(), strict=True)
        ]
        allowed_MV = raw_MV.clone()
        apply_all(allowed_MV, chosen, offset_A.tolist(), drafts)
        return allowed_MV

    def _rules_of(self, rows_M: Ints, device: torch.device) -> Rules:
        """The sampling rules, kept while the same rows are drawn for."""
        kept = self._rules
        same = kept is not None and (kept[0] is rows_M or np.array_equal(kept[0], rows_M))
        if kept is None or not same or self._scheduler.changed:
            kept = self._rules = (rows_M, rules_of(self._rows.state[rows_M], device))
            self._scheduler.changed = False
        return kept[1]

    def _end(self, rows: Ints, reason: FinishReason) -> None:
        for row in rows.tolist():
            self._ended[row] = (reason, None, False)

    def _fail(self, rows: Ints, at: Ints, raw_MV: Tensor) -> None:
        """Ends rows that no token could be drawn for."""
        for row, index in zip(rows.tolist(), at.tolist(), strict=True):
            name, constraint = self._rows.requests[row].id, self._rows.constraints[row]
            if constraint is not None and bool(raw_MV[index].max().isfinite()):
                self._ended[row] = ("error", f"request {name}: {constraint.explain()}", False)
                continue
            text = (
                f"the model gave NaN or infinite logits at position {int(self._rows.state['total'][row])} of request "
                f"{name}; check the weights, or the precision they are kept in"
            )
            self._ended[row] = ("error", text, True)


def _likeliest(logits_SV: Tensor, k: int) -> list[TopLogprobs]:
    ids_Sk, values_Sk = top_logprobs(logits_SV, k)
    rows = zip(ids_Sk.tolist(), values_Sk.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in rows]
