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

EarlyStopping = Literal[True, False, "never"]


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
    early_stopping: EarlyStopping = False,
) -> list[Beam]:
    """At most `num_beams` replies, the best score first; the arguments are those of BeamSearch."""
    search = BeamSearch(
        request,
        num_beams=num_beams,
        end_ids=end_ids,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    while asked := search.requests():
        search.take(engine.run(asked))
    return search.results()


class BeamSearch:
    """A search in progress: whoever has an engine computes what `requests` asks for and hands it to `take`.

    `end_ids` and the request's stop_ids end a beam. Of the request's parameters only max_tokens and stop_ids count:
    beams are compared by the model's own log-probabilities. `early_stopping` True stops at `num_beams` ended replies,
    False when the best running beam scores below them at its present length, "never" when it does at its best length.
    Raises ModelError where a beam needs more leading tokens than an engine reports, or a request fails.
    """

    def __init__(
        self,
        request: Request,
        *,
        num_beams: int,
        end_ids: Sequence[int],
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
    ) -> None:
        self._ends = frozenset((*end_ids, *request.params.stop_ids))
        self._num_leading = num_beams + len(self._ends)
        if num_beams < 1 or self._num_leading > MAX_TOP_LOGPROBS:
            raise ModelError(
                f"request {request.id} has num_beams {num_beams}; with {len(self._ends)} stop tokens it must be 1 to "
                f"{MAX_TOP_LOGPROBS - len(self._ends)}"
            )
        self._request, self._num_beams = request, num_beams
        self._max_tokens = request.params.max_tokens
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self._length = 0
        self._running: list[tuple[list[int], float]] = [([], 0.0)]
        """Unfinished beams with their log-probabilities, the likeliest first."""
        self._found: list[Beam] = []
        self._can_improve = True

    def requests(self) -> list[Request]:
        """One for the likeliest next tokens of every beam; none when the search is over."""
        params = SamplingParams(max_tokens=1, top_logprobs=self._num_leading, ignore_eos=True)
        request = self._request
        return [
            msgspec.structs.replace(
                request, id=f"{request.id}-beam-{number}", tokens=[*request.tokens, *tokens], params=params
            )
            for number, (tokens, _) in enumerate(self._running)
        ]

    def take(self, completions: Sequence[Completion]) -> None:
        """One token more; `completions` are those of `requests`, in their order."""
        failed = next((each.error for each in completions if each.error is not None), None)
        if failed is not None:
            raise ModelError(failed)
        if any(not each.top_logprobs for each in completions):  # out of time
            self.cut()
            return
        self._length += 1
        self._advance([each.top_logprobs[0] for each in completions], self._length)
        if self._is_over(self._length):
            self._running = []

    def cut(self) -> None:
        """Ends the search where it is: unfinished beams count as they are."""
        running = [self._beam(tokens, total, False) for tokens, total in self._running if tokens]
        self._found = sorted(self._found + running, key=lambda beam: -beam.score)[: self._num_beams]
        self._running = []

    def results(self) -> list[Beam]:
        """The ended replies, the best score first."""
        return self._found

    def _beam(self, tokens: list[int], total: float, ended: bool) -> Beam:
        return Beam(tokens, total, total / len(tokens) ** self._length_penalty, ended)

    def _advance(self, leading: Sequence[Sequence[tuple[int, float]]], length: int) -> None:
        """`leading` has the next tokens of every running beam with their log-probabilities."""
        candidates = [
            (total + logprob, [*tokens, token])
            for (tokens, total), nexts in zip(self._running, leading, strict=True)
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
                self._found.append(self._beam(tokens, total, ended))
        self._found = sorted(self._found, key=lambda beam: -beam.score)[: self._num_beams]
        self._running = going_on[: self._num_beams]

    def _is_over(self, length: int) -> bool:
        """Whether no running beam can become one of the results."""
        if not self._running:
            return True
        full = len(self._found) == self._num_beams
        if full and self._early_stopping is True:
            return True
        longest = self._early_stopping == "never" and self._length_penalty > 0
        best_length = self._max_tokens if longest else length
        possible = self._running[0][1] / best_length**self._length_penalty
        self._can_improve = not full or possible > self._found[-1].score
        return not self._can_improve
