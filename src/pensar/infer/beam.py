"""Beam search: the likeliest replies as a whole, found by asking an engine for the leading next tokens of every beam.

The rules are those of transformers' `generate(num_beams=...)`: of the (1 + ends) x beams best continuations the best
unfinished ones go on, and an ended one counts when it is among the best `num_beams`. The engine computes a beam's text
once: the prefix cache has all of it but the newest tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from pensar.base.errors import ModelError
from pensar.infer.request import MAX_TOP_LOGPROBS, Completion, Request, SamplingParams


class Runs(Protocol):
    """What is asked of an engine."""

    def run(self, requests: Sequence[Request]) -> list[Completion]: ...


@dataclass(frozen=True, slots=True)
class Beam:
    """A reply that beam search found; `ended` by a stop token, which it includes, or else by max_tokens."""

    tokens: list[int]
    logprob: float
    """Of all its tokens together."""
    score: float
    """logprob / length ** length_penalty."""
    ended: bool


def beam_search(
    engine: Runs,
    request: Request,
    *,
    num_beams: int,
    end_ids: Sequence[int],
    length_penalty: float = 1.0,
    early_stopping: Literal[True, False, "never"] = False,
) -> list[Beam]:
    """At most `num_beams` replies, the best score first.

    `end_ids` and the request's stop_ids end a beam. Of the request's parameters only max_tokens and stop_ids count:
    beams are compared by the model's own log-probabilities. `early_stopping` True stops at `num_beams` ended replies,
    False when the best running beam scores below them at its present length, "never" when it does at its best length.
    Raises ModelError where a beam needs more leading tokens than an engine reports, or a request fails.
    """
    ends = frozenset((*end_ids, *request.params.stop_ids))
    num_leading = num_beams + len(ends)
    if num_beams < 1 or num_leading > MAX_TOP_LOGPROBS:
        raise ModelError(
            f"request {request.id} has num_beams {num_beams}; with {len(ends)} stop tokens it must be 1 to "
            f"{MAX_TOP_LOGPROBS - len(ends)}"
        )
    max_tokens = request.params.max_tokens
    search = _Search(num_beams, max_tokens, length_penalty, early_stopping, ends)
    for length in range(1, max_tokens + 1):
        leading = _leading(engine, request, search.running, num_leading)
        search.advance(leading, length)
        if search.is_over(length):
            break
    return search.results()


class _Search:
    """Running beams as (tokens, logprob), the likeliest first, and the replies that have ended."""

    def __init__(
        self,
        num_beams: int,
        max_tokens: int,
        length_penalty: float,
        early_stopping: Literal[True, False, "never"],
        ends: frozenset[int],
    ) -> None:
        self._num_beams, self._max_tokens = num_beams, max_tokens
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self._ends = ends
        self.running: list[tuple[list[int], float]] = [([], 0.0)]
        self._found: list[Beam] = []
        self._can_improve = True

    def advance(self, leading: Sequence[Sequence[tuple[int, float]]], length: int) -> None:
        """One token more; `leading` has the next tokens of every running beam with their log-probabilities."""
        candidates = [
            (total + logprob, [*tokens, token])
            for (tokens, total), nexts in zip(self.running, leading, strict=True)
            for token, logprob in nexts
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        candidates = candidates[: max(2, 1 + len(self._ends)) * self._num_beams]
        full = self._early_stopping is True and len(self._found) == self._num_beams
        going_on = []
        for rank, (total, tokens) in enumerate(candidates):
            ended = tokens[-1] in self._ends
            if not ended and length < self._max_tokens:
                going_on.append((tokens, total))
            elif rank < self._num_beams and self._can_improve and not full:
                self._found.append(Beam(tokens, total, total / length**self._length_penalty, ended))
        self._found = sorted(self._found, key=lambda beam: -beam.score)[: self._num_beams]
        self.running = going_on[: self._num_beams]

    def is_over(self, length: int) -> bool:
        """Whether no running beam can become one of the results."""
        if not self.running:
            return True
        full = len(self._found) == self._num_beams
        if full and self._early_stopping is True:
            return True
        longest = self._early_stopping == "never" and self._length_penalty > 0
        best_length = self._max_tokens if longest else length
        possible = self.running[0][1] / best_length**self._length_penalty
        self._can_improve = not full or possible > self._found[-1].score
        return not self._can_improve

    def results(self) -> list[Beam]:
        """The ended replies, the best score first."""
        return self._found


def _leading(
    engine: Runs, request: Request, beams: Sequence[tuple[list[int], float]], count: int
) -> list[Sequence[tuple[int, float]]]:
    """The likeliest next tokens of every beam."""
    params = SamplingParams(max_tokens=1, top_logprobs=count, ignore_eos=True)
    asked = [
        msgspec.structs.replace(
            request, id=f"{request.id}-beam-{number}", tokens=[*request.tokens, *tokens], params=params
        )
        for number, (tokens, _) in enumerate(beams)
    ]
    leading: list[Sequence[tuple[int, float]]] = []
    for completion in engine.run(asked):
        if completion.error is not None:
            raise ModelError(completion.error)
        leading.append(completion.top_logprobs[0])
    return leading
