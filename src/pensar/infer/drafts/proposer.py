"""Proposer: whoever guesses how texts go on, and the drawing of guesses from a distribution.

A guess is kept where it is what the model's own logits, the request's seed and the token's index give. So the best
guess is what they would give if the guesser's logits were the model's: drawn by the request's own rules, at the same
uniform number. Where the two distributions agree the guess is right for certain, however hot the sampling.
Shape legend: A rows that are asked for, G of them that take another guess, q tokens of one row, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from pensar.infer.budget import Bools
from pensar.infer.constraint import apply_all
from pensar.infer.request import Ints
from pensar.infer.rows import RunningRows
from pensar.infer.sampling import Rules, rules_of, sample, uniforms


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose next tokens are to be guessed, and how many."""

    rows: RunningRows
    chosen: Ints
    """[A] row numbers, ascending. They change from step to step: whoever keeps something keeps it by request id."""
    counts: Ints
    """[A] guesses at most, at least one."""


@dataclass(frozen=True, slots=True)
class States:
    """The model's last states at consecutive positions of one text, all of them kept tokens."""

    name: str
    first: int
    """Position of the first."""
    hidden_qD: Tensor


class Proposer(Protocol):
    """Guesses for many rows at once. Texts only grow, save for what was guessed and not kept."""

    wants_states: bool
    """Whether `observe` has to be called."""

    def propose(self, asked: Asked) -> list[Ints]:
        """Guesses for each row, none where it has no idea."""
        ...

    def observe(self, rows: RunningRows, states: Sequence[States]) -> None:
        """States of a step whose tokens have been added to the texts of `rows`."""
        ...

    def forget(self, name: str) -> None:
        """This request does not run any more."""
        ...


class FirstOf:
    """Asks each proposer for the rows that those before had no guess for."""

    def __init__(self, *proposers: Proposer) -> None:
        self._proposers = proposers
        self.wants_states = any(proposer.wants_states for proposer in proposers)

    def propose(self, asked: Asked) -> list[Ints]:
        guesses = [np.zeros(0, np.int64)] * len(asked.chosen)
        for proposer in self._proposers:
            left = [index for index, guess in enumerate(guesses) if not len(guess)]
            if not left:
                break
            found = proposer.propose(Asked(asked.rows, asked.chosen[left], asked.counts[left]))
            for index, guess in zip(left, found, strict=True):
                guesses[index] = guess
        return guesses

    def observe(self, rows: RunningRows, states: Sequence[States]) -> None:
        for proposer in self._proposers:
            if proposer.wants_states:
                proposer.observe(rows, states)

    def forget(self, name: str) -> None:
        for proposer in self._proposers:
            proposer.forget(name)


class Drawing:
    """The guesses of one step, drawn one depth after the other.

    Constraints go along with the guesses; on leaving the block they are where they were.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._guesses: Ints = np.zeros((len(asked.chosen), int(asked.counts.max(initial=0))), np.int64)
        self._num: Ints = np.zeros(len(asked.chosen), np.int64)
        self._accepted: Ints = np.zeros(len(asked.chosen), np.int64)
        self._rules: tuple[Ints, Rules] | None = None
        self.depth = 0
        self.going: Ints = np.arange(len(asked.chosen))
        """Indices into what was asked of the rows that the next guess is for."""

    @property
    def rows(self) -> Ints:
        """Their row numbers."""
        return self._asked.chosen[self.going]

    def drop(self, among: Bools) -> None:
        """Rows of `going` that get no guess after all."""
        self.going = self.going[~among]

    def take(self, logits_GV: Tensor) -> tuple[Bools, Ints]:
        """Draws a guess for every row of `going`; which of these rows are still going, and these rows' guesses."""
        rows, numbers = self._asked.rows, self.rows
        logits_GV = self._constrained(logits_GV.float(), numbers)
        state = rows.state
        index_G = state["total"][numbers] - state["prompt"][numbers] + self.depth
        uniform = torch.from_numpy(uniforms(state["seed"][numbers], index_G)).to(logits_GV.device)
        draw = sample(logits_GV, self._rules_of(numbers, logits_GV.device), uniform)
        ids, sound = draw.ids.cpu().numpy(), draw.sound
        self._guesses[self.going, self.depth] = ids
        self._num[self.going] += sound
        self.depth += 1
        on = sound & (self._asked.counts[self.going] > self.depth) & ~rows.stopped(numbers, ids)
        for at in np.flatnonzero(on).tolist() if any(rows.constraints) else ():
            if (constraint := rows.constraints[int(numbers[at])]) is not None:
                constraint.accept(int(ids[at]))
                self._accepted[self.going[at]] += 1
        self.going = self.going[on]
        return on, ids[on]

    def guesses(self) -> list[Ints]:
        """What was drawn for each row that was asked for."""
        return [guess[:num] for guess, num in zip(self._guesses, self._num.tolist(), strict=True)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index in np.flatnonzero(self._accepted).tolist():
            constraint = self._asked.rows.constraints[int(self._asked.chosen[index])]
            assert constraint is not None
            constraint.rollback(int(self._accepted[index]))

    def _constrained(self, logits_GV: Tensor, numbers: Ints) -> Tensor:
        constraints = [self._asked.rows.constraints[row] for row in numbers.tolist()]
        if any(constraints):
            logits_GV = logits_GV.clone()
            apply_all(logits_GV, constraints)
        return logits_GV

    def _rules_of(self, numbers: Ints, device: torch.device) -> Rules:
        if self._rules is None or not np.array_equal(self._rules[0], numbers):
            self._rules = numbers, rules_of(self._asked.rows.state[numbers], device)
        return self._rules[1]
