"""Tally: what one sequence has used so far; Totals: the sum over a request's, for its `usage` and its record."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pensar.infer.engine import Completion, Piece, Request
from pensar.infer.outbox import UsageRecord
from pensar.infer.request import FinishReason

WORST_FIRST: tuple[FinishReason, ...] = ("error", "abort", "deadline", "length", "stop")


@dataclass
class Tally:
    """Tokens of one sequence."""

    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    version: int = 0
    """Of the weights that drew the last token."""
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        """Goes on by what a step has made."""
        self.completion_tokens += len(piece.tokens)
        self.reasoning_tokens = piece.reasoning_tokens
        self.cached_tokens = piece.cached_tokens
        self.version = piece.version
        self.finish_reason = piece.finish_reason

    def settle(self, completion: Completion) -> None:
        """What the engine says of a sequence that was taken out of it."""
        self.completion_tokens = len(completion.tokens)
        self.reasoning_tokens = completion.num_reasoning_tokens
        self.cached_tokens = completion.num_cached_tokens
        self.version = completion.version


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Of one request: what `usage` in its reply says, and what its record says."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int

    def record(self, request: Request, tallies: Sequence[Tally], name: str, model: str) -> UsageRecord:
        """One record for the whole of `request`, under its reply's id; its finish_reason is the worst of its sequences.

        `prompt_tokens` is the prompt as it was sent, also where the request ended before it was computed.
        """
        reasons = {tally.finish_reason or "stop" for tally in tallies}
        return UsageRecord(
            id=name,
            user=request.user,
            model=model,
            adapter=request.adapter,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            reasoning_tokens=self.reasoning_tokens,
            output_tokens=self.completion_tokens,
            finish_reason=next(reason for reason in WORST_FIRST if reason in reasons),
            finished=time.time(),
            version=max(tally.version for tally in tallies),
        )


def totals_of(prompt_lengths: Sequence[int], tallies: Sequence[Tally]) -> Totals:
    """The sum over sequences, as many for each prompt in turn.

    A prompt counts once, however many sequences continue it, and so does what was cached of it: what its first sequence
    found in the cache, since the others find there what the first one has computed.
    """
    each = len(tallies) // len(prompt_lengths)
    return Totals(
        prompt_tokens=sum(prompt_lengths),
        cached_tokens=sum(tally.cached_tokens for tally in tallies[::each]),
        completion_tokens=sum(tally.completion_tokens for tally in tallies),
        reasoning_tokens=sum(tally.reasoning_tokens for tally in tallies),
    )
