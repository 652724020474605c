"""Constraint: what one request asks of its tokens beyond temperature and filters, as changes to its logits.

Penalties come first, then the bias, then what must not be drawn: banned tokens, ends that come too early, the end of
thinking that comes too early, and what the grammar does not allow. A grammar is about the answer: the thinking block
before it is free, and so are up to two line feeds after the block. A request that asks for none of this has no
Constraint and costs nothing. Shape legend: S places whose next token is drawn, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pensar.base.errors import ModelError
from pensar.infer.budget import ANSWER, BEGINNING, THINKING, Thinking
from pensar.infer.edits import Edits
from pensar.infer.grammar import Bits, Compiled, Grammars, Matcher
from pensar.infer.request import Ints, Request, SamplingParams
from pensar.infer.seen import Seen
from pensar.text.tokenizer import Tokenizer

KEPT = 1_024
"""Newest tokens that can be taken back."""

MAX_GAP = 2
"""Line feeds between the thinking block and an answer by a grammar."""

AWAITED, FREE, INSIDE, OVER = range(4)
"""Where an answer is: the grammar has not begun, free text around tool calls, inside the grammar, past its end."""


class Constraints:
    """Makes the constraints of an engine's requests. Without a tokenizer there are no grammars."""

    def __init__(
        self,
        vocab_size: int,
        tokenizer: Tokenizer | None,
        thinking: Thinking | None,
        end_ids: tuple[int, ...],
    ) -> None:
        self.vocab_size = vocab_size
        self.thinking = thinking
        self.end_ids = end_ids
        self.grammars = None if tokenizer is None else Grammars(tokenizer)
        self._tokenizer = tokenizer

    def of(self, request: Request, prompt: Ints) -> "Constraint | None":
        """None where the request asks for nothing that needs one.

        Raises ModelError for a grammar that cannot be used. The first use of a grammar takes up to seconds: a server
        calls `grammars.compiled` beforehand on a thread that may wait.
        """
        params = request.params
        if not asks(params):
            return None
        if params.min_thinking and self.thinking is None:
            raise ModelError(
                f"request {request.id} has min_thinking {params.min_thinking}, but the tokenizer has no thinking tags; "
                "leave it out"
            )
        phase = ANSWER if self.thinking is None else self.thinking.phase_of(prompt)
        compiled, gap = None, 0
        if params.grammar is not None:
            if self.grammars is None or self._tokenizer is None:
                raise ModelError(
                    f"request {request.id} has a grammar, which needs an engine with a tokenizer"
                )
            try:
                compiled = self.grammars.compiled(params.grammar)
            except ModelError as error:
                raise ModelError(f"request {request.id}: {error}") from error
            text = self._tokenizer.decode(prompt[-MAX_GAP:].tolist())
            written = len(text) - len(text.rstrip("\n")) if phase == ANSWER else 0
            gap = max(0, MAX_GAP - written)
        return Constraint(params, prompt, self, compiled, phase, gap)


def asks(params: SamplingParams) -> bool:
    """Whether a request needs a Constraint."""
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
        or params.logit_bias
        or params.bad_ids
        or params.min_tokens
        or params.min_thinking
        or params.grammar is not None
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """What a token changes, apart from counts and the matcher's own state."""

    phase: int
    reasoning: int
    where: int
    gap: int
    matcher: Matcher | None
    error: str


class Constraint:
    """The state of one reply. Every token of it is accepted, whether it was drawn, forced or guessed.

    `error` says why the reply cannot go on, where that is so.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Ints,
        shared: Constraints,
        compiled: Compiled | None,
        phase: int,
        gap: int,
    ) -> None:
        self._shared, self._thinking, self._compiled = shared, shared.thinking, compiled
        self._params = params
        self._bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._bad_ids = np.array(params.bad_ids, np.int64)
        ends = (*(() if params.ignore_eos else shared.end_ids), *params.stop_ids)
        self._ends = np.array(sorted(set(ends)), np.int64)
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        self._seen = Seen(prompt if params.repetition_penalty != 1 else prompt[:0]) if penalised else None
        where, matcher = FREE, None
        if compiled is not None and compiled.trigger is None:
            where, matcher = AWAITED, compiled.start.fork()
        self._place = _Place(phase, 0, where, gap, matcher, "")
        # Of every accepted token: it, the place before it, and whether the matcher took it.
        self._history: list[tuple[int, _Place, bool]] = []
        self._length = 0

    @property
    def error(self) -> str:
        """Why no token can follow; empty while one can."""
        return self._place.error

    @property
    def ended(self) -> bool:
        """Whether the grammar is complete and only a stop token is left to come."""
        place = self._place
        return place.where == OVER or (
            place.where == INSIDE and not self._calls and place.matcher is not None and place.matcher.finished
        )

    def apply(self, logits_V: Tensor) -> None:
        """Changes the float32 logits of the next token in place."""
        apply_all(logits_V[None], [self])

    def allows(self, token: int) -> bool:
        """Whether `token` may come next, penalties and bias apart."""
        place = self._place
        if token in self._banned() or token in self._bad_ids:
            return False
        if self._compiled is None or place.phase == THINKING or place.where == FREE:
            return True
        if place.error or place.where == OVER:
            return not place.error and token in self._ends
        matcher = place.matcher
        assert matcher is not None
        if matcher.allows(token):
            return True
        if token in self._ends:
            return matcher.complete and not self._calls
        opens = place.phase == BEGINNING and self._thinking is not None and token == self._thinking.open_id
        return place.where == AWAITED and (opens or self._is_gap(token, place.gap))

    def accept(self, token: int) -> None:
        """Goes on by a token of the reply; one that is not allowed sets `error`."""
        place, took = self._after(token)
        self._history.append((token, self._place, took))
        if len(self._history) > 2 * KEPT:
            del self._history[:-KEPT]
        self._place = place
        self._length += 1
        if self._seen is not None:
            self._seen.add(token)

    def rollback(self, count: int) -> None:
        """Takes back the last `count` accepted tokens."""
        for _ in range(count):
            token, self._place, took = self._history.pop()
            self._length -= 1
            if took:
                assert self._place.matcher is not None
                self._place.matcher.rollback(1)
            if self._seen is not None:
                self._seen.remove(token)

    def forced(self) -> list[int]:
        """A likely spelling of the only text that the grammar lets come next: drafts that cost no drafting."""
        place = self._place
        if place.matcher is None or place.phase == THINKING or place.where == OVER or place.error:
            return []
        return place.matcher.forced()

    def explain(self) -> str:
        """Why there was no token to draw, for logits that were sound before `apply`."""
        return (
            self.error or "its grammar, bad_ids, min_tokens and min_thinking together leave no token to draw"
        )

    def collect(self, edits: "Edits", row: int) -> None:
        """What `apply` would change, for logits row `row`."""
        params = self._params
        if self._seen is not None:
            edits.penalties.append((row, *self._seen.penalties(params)))
        if len(self._bias_ids):
            edits.biases.append((row, self._bias_ids, self._bias))
        banned = self._banned()
        if len(self._bad_ids):
            edits.bans.append((row, self._bad_ids))
        if len(banned):
            edits.bans.append((row, banned))
        bits = self._mask()
        if bits is not None:
            edits.masks.append((row, bits))

    # ------------------------------------------------------------ the answer

    @property
    def _calls(self) -> bool:
        """Whether the grammar is of tool calls inside free text."""
        return self._compiled is not None and self._compiled.trigger is not None

    def _after(self, token: int) -> tuple[_Place, bool]:
        """Where the reply is after a token, and whether the matcher took it."""
        old = self._place
        phase, reasoning = old.phase, old.reasoning
        if self._thinking is not None:
            phase = self._thinking.after(old.phase, token)
            reasoning += old.phase == phase == THINKING
        new = _Place(phase, reasoning, old.where, old.gap, old.matcher, old.error)
        compiled = self._compiled
        if compiled is None or old.error or THINKING in (old.phase, phase):
            if old.phase == THINKING != phase:
                new = _Place(phase, reasoning, old.where, MAX_GAP, old.matcher, old.error)
            return new, False
        if old.where == FREE:
            if token != compiled.trigger:
                return new, False
            return _Place(phase, reasoning, INSIDE, 0, compiled.start.fork(), ""), False
        if old.where == OVER or token in self._ends:
            return new, False
        matcher = old.matcher
        assert matcher is not None
        allowed = matcher.allows(token)
        if old.where == AWAITED and not allowed and self._is_gap(token, old.gap):
            return _Place(phase, reasoning, AWAITED, old.gap - self._newlines[token], matcher, ""), False
        if not allowed or not matcher.accept(token):
            error = f"token {token} does not follow its grammar"
            return _Place(phase, reasoning, INSIDE, 0, matcher, error), False
        where = INSIDE
        if self._calls and matcher.finished:
            where = FREE if compiled.repeats else OVER
        return _Place(phase, reasoning, where, 0, matcher, ""), True

    def _banned(self) -> Ints:
        """Tokens that come too early."""
        place, params = self._place, self._params
        banned: list[Ints] = []
        open_grammar = self._compiled is not None and not self._calls
        if place.phase == THINKING:
            if place.reasoning < params.min_thinking and self._thinking is not None:
                banned.append(np.array([self._thinking.close_id]))
                banned.append(self._ends)
            elif open_grammar:  # the answer that the grammar is about has to come
                banned.append(self._ends)
        if self._length < params.min_tokens and not self.ended:
            banned.append(self._ends)
        return np.concatenate(banned) if banned else self._ends[:0]

    def _mask(self) -> Bits | None:
        """The tokens that the grammar allows; None for all."""
        place, compiled = self._place, self._compiled
        if compiled is None or place.phase == THINKING or place.where == FREE:
            return None
        grammars = self._shared.grammars
        assert grammars is not None
        bits = np.zeros(4 * -(-self._shared.vocab_size // 32), np.uint8)  # rows that no token has stay shut
        if place.error:
            return bits
        if place.where == OVER:
            _mark(bits, self._ends)
            return bits
        assert place.matcher is not None
        error = place.matcher.fill(bits[: grammars.num_bytes])
        if error:
            self._place = _Place(
                place.phase, place.reasoning, INSIDE, 0, place.matcher, f"its grammar: {error}"
            )
            bits[:] = 0
            return bits
        end = grammars.end_id
        if bits[end >> 3] >> (end & 7) & 1 and not self._calls:
            _mark(bits, self._ends)
        else:
            bits[end >> 3] &= ~np.uint8(1 << (end & 7))
        if place.where == AWAITED:
            _mark(bits, [token for token in self._newlines if self._is_gap(token, place.gap)])
            if place.phase == BEGINNING and self._thinking is not None:
                _mark(bits, [self._thinking.open_id])
        return bits

    @property
    def _newlines(self) -> dict[int, int]:
        grammars = self._shared.grammars
        return {} if grammars is None else grammars.newlines

    def _is_gap(self, token: int, gap: int) -> bool:
        return 0 < self._newlines.get(token, 0) <= gap


def apply_all(
    logits_SV: Tensor,
    constraints: Sequence[Constraint | None],
    rows: Sequence[int] | None = None,
    drafts: Sequence[Sequence[int]] | None = None,
) -> None:
    """`apply` for many replies: constraints[i] is about logits row rows[i], or i, in place.

    With drafts[i] it is also about the rows after it, one for each draft: what may follow when the drafts up to there
    are right. The constraints are left where they were. Rows behind a draft that is not allowed stay as they are:
    it cannot be drawn, so nothing is drawn from them.
    """
    edits = Edits()
    for index, constraint in enumerate(constraints):
        if constraint is None:
            continue
        row = index if rows is None else rows[index]
        constraint.collect(edits, row)
        count = 0
        for draft in () if drafts is None else drafts[index]:
            if not constraint.allows(draft):
                break
            constraint.accept(draft)
            count += 1
            constraint.collect(edits, row + count)
        constraint.rollback(count)
    edits.apply(logits_SV)


def _mark(bits: Bits, tokens: Iterable[int]) -> None:
    for token in tokens:
        if token < 8 * len(bits):
            bits[token >> 3] |= np.uint8(1 << (token & 7))
