"""Remote: an engine that another process runs, behind the calls of ours."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pensar.base.errors import ModelError
from pensar.infer.backends.streams import Event, Stream, Streams
from pensar.infer.budget import ANSWER, THINKING, Thinking
from pensar.infer.request import (
    Completion,
    FinishReason,
    Ints,
    Piece,
    Request,
    TopLogprobs,
    checked_prompt,
)
from pensar.text.tokenizer import Tokenizer

WAIT_SECONDS = 0.05
"""How long a step waits for something to report."""
ANY = 2**31
"""In place of a limit that only the server knows."""


@dataclass
class Delta:
    """What one event adds to a reply."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_tops: list[TopLogprobs] = field(default_factory=list)
    cached_tokens: int | None = None
    finish_reason: FinishReason | None = None


class Dialect(Protocol):
    """How an engine's API says what ours says."""

    path: str

    def body(self, request: Request) -> dict[str, Any]:
        """The request's JSON. Raises ModelError for what the engine cannot do."""
        ...

    def delta(self, request: Request, content: dict[str, Any], begun: bool) -> Delta:
        """What an event says; `begun` once tokens of the reply have come."""
        ...


class Remote:
    """The calls of our engine, answered by a server; see `pensar.infer.backends.backend.Backend`.

    With a tokenizer the reasoning tokens are counted here, and what the thinking budget has forced is told from them:
    the stop sentence at the very place where the budget is spent. Without one nothing counts as reasoning.
    """

    def __init__(
        self,
        streams: Streams,
        dialect: Dialect,
        tokenizer: Tokenizer | None = None,
        *,
        vocab_size: int = ANY,
        max_positions: int = ANY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.version = 0
        self.streams, self.dialect = streams, dialect
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self._thinking = None if tokenizer is None else Thinking(tokenizer)
        self._clock = clock
        self._replies: dict[str, Reply] = {}
        self._by_stream: dict[Stream, Reply] = {}

    @property
    def num_running(self) -> int:
        return sum(reply.finish_reason is None for reply in self._replies.values()) - self.num_waiting

    @property
    def num_waiting(self) -> int:
        return self.streams.num_waiting

    def submit(self, request: Request) -> None:
        """Sends a request. ModelError for one that is known to be impossible; the server may refuse others later."""
        if request.id in self._replies:
            raise ModelError(f"request id {request.id!r} is in use by an unfinished request; choose another")
        prompt = checked_prompt(request, self.vocab_size, self.max_positions)
        if request.params.thinking_budget is not None and self._thinking is None:
            raise ModelError(
                f"request {request.id} has thinking_budget {request.params.thinking_budget} and the backend no "
                "tokenizer to count with; give it the model's"
            )
        body = self.dialect.body(request)
        deadline = None
        if request.timeout_seconds is not None:
            deadline = self._clock() + request.timeout_seconds
        reply = Reply(request, prompt, self._thinking, deadline)
        reply.stream = self.streams.open(self.dialect.path, body)
        self._replies[request.id] = self._by_stream[reply.stream] = reply

    def step(self) -> list[Piece]:
        """What has arrived; waits a moment for it, and not at all when nothing is under way."""
        known = any(reply.is_new for reply in self._replies.values())
        self._advance(0 if known else WAIT_SECONDS)
        fresh = [reply for reply in self._replies.values() if reply.is_new]
        for reply in fresh:
            if reply.finish_reason is not None:
                self._drop(reply)
        return [reply.piece(self.version) for reply in fresh]

    def abort(self, name: str) -> Completion | None:
        reply = self._replies.get(name)
        if reply is None:
            return None
        self._drop(reply)
        return None if reply.finish_reason is not None else reply.completion("abort", self.version)

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Requests that were submitted before go on meanwhile and are reported by the next `step`."""
        results: list[Completion | None] = [None] * len(requests)
        awaited: dict[str, int] = {}
        for index, request in enumerate(requests):
            try:
                self.submit(request)
                awaited[request.id] = index
            except ModelError as error:
                results[index] = Completion(
                    tokens=[], logprobs=[], forced=[], finish_reason="error", error=str(error)
                )
        try:
            while awaited:
                self._advance(WAIT_SECONDS)
                for name in list(awaited):
                    reply = self._replies[name]
                    if reply.finish_reason is not None:
                        self._drop(reply)
                        results[awaited.pop(name)] = reply.completion(reply.finish_reason, self.version)
        finally:
            for name in awaited:  # only when interrupted
                self.abort(name)
        return [result for result in results if result is not None]

    def settle(self) -> None:
        """Takes in what has arrived, so that it bears the present version."""
        for event in self.streams.events(0):
            self._take(event)

    def _advance(self, wait_seconds: float) -> None:
        if not self._replies:
            return
        for event in self.streams.events(wait_seconds):
            self._take(event)
        now = self._clock()
        for reply in self._replies.values():
            if reply.deadline is not None and reply.deadline <= now and reply.finish_reason is None:
                reply.finish_reason = "deadline"
                self._cut(reply)

    def _take(self, event: Event) -> None:
        reply = self._by_stream.get(event.stream)
        if reply is None:  # of a request that was taken out
            return
        if event.content is not None:
            reply.add(self.dialect.delta(reply.request, event.content, reply.begun))
        elif event.error is not None:
            reply.fail(event.error)
        else:
            reply.end()

    def _drop(self, reply: "Reply") -> None:
        del self._replies[reply.request.id]
        self._cut(reply)

    def _cut(self, reply: "Reply") -> None:
        """Hears no more of it."""
        stream = reply.stream
        if stream is not None and self._by_stream.pop(stream, None) is not None:
            self.streams.close(stream)


class Reply:
    """One request's reply as far as it has come."""

    def __init__(
        self, request: Request, prompt: Ints, thinking: Thinking | None, deadline: float | None
    ) -> None:
        self.request, self.deadline = request, deadline
        self.stream: Stream | None = None
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._whole = Delta()
        self._announced: FinishReason | None = None
        """Known, but further events of the stream may follow."""
        self._forced: list[bool] = []
        self._reported = 0
        self._thinking = thinking
        self._phase = ANSWER if thinking is None else thinking.phase_of(prompt)
        self._reasoning = 0
        self._sentence: Iterator[int] | None = None

    @property
    def begun(self) -> bool:
        return bool(self._whole.tokens)

    @property
    def is_new(self) -> bool:
        """Whether something has not been reported yet."""
        return self.finish_reason is not None or self._reported < len(self._whole.tokens)

    def add(self, delta: Delta) -> None:
        whole = self._whole
        for token in delta.tokens:
            self._forced.append(self._count(token))
        whole.tokens += delta.tokens
        whole.logprobs += delta.logprobs
        whole.tops += delta.tops
        whole.prompt_logprobs += delta.prompt_logprobs
        whole.prompt_tops += delta.prompt_tops
        whole.cached_tokens = delta.cached_tokens if delta.cached_tokens is not None else whole.cached_tokens
        self._announced = delta.finish_reason or self._announced

    def end(self) -> None:
        """The stream is over."""
        if self._announced is None:
            self.fail("the server ended the reply without a reason")
        else:
            self.finish_reason = self._announced

    def fail(self, error: str) -> None:
        self.finish_reason, self.error = "error", f"request {self.request.id}: {error}"

    def piece(self, version: int) -> Piece:
        """What has not been reported yet."""
        first, start, self._reported = not self._reported, self._reported, len(self._whole.tokens)
        part = self._part(start, self.finish_reason or "length", version)
        params = self.request.params
        left = None
        if params.thinking_budget is not None:
            left = max(0, params.thinking_budget - self._reasoning) if self._phase <= THINKING else 0
        return Piece(
            id=self.request.id,
            tokens=part.tokens,
            logprobs=part.logprobs if params.logprobs or params.top_logprobs else None,
            forced=part.forced,
            finish_reason=self.finish_reason,
            reasoning_tokens=self._reasoning,
            reasoning_left=left,
            cached_tokens=part.num_cached_tokens,
            version=version,
            top_logprobs=part.top_logprobs if params.top_logprobs else None,
            prompt_logprobs=part.prompt_logprobs if first and params.prompt_logprobs else None,
            prompt_top_logprobs=(part.prompt_top_logprobs or None) if first else None,
            error=self.error,
        )

    def completion(self, reason: FinishReason, version: int) -> Completion:
        """All of it."""
        return self._part(0, reason, version)

    def _part(self, start: int, reason: FinishReason, version: int) -> Completion:
        whole = self._whole
        return Completion(
            tokens=whole.tokens[start:],
            logprobs=whole.logprobs[start:],
            forced=self._forced[start:],
            finish_reason=reason,
            num_reasoning_tokens=self._reasoning,
            num_cached_tokens=whole.cached_tokens or 0,
            version=version,
            top_logprobs=whole.tops[start:],
            prompt_logprobs=whole.prompt_logprobs,
            prompt_top_logprobs=whole.prompt_tops,
            error=self.error,
        )

    def _count(self, token: int) -> bool:
        """Moves the phase on; whether the budget has put the token there."""
        thinking, budget = self._thinking, self.request.params.thinking_budget
        if thinking is None:
            return False
        if self._sentence is not None:
            if next(self._sentence, None) == token:
                self._phase = ANSWER
                return True
            self._sentence = None
        spent = budget is not None and self._phase == THINKING and self._reasoning >= budget
        if spent and token == thinking.stop_sentence[0] and token != thinking.close_id:
            self._sentence = iter(thinking.stop_sentence[1:].tolist())
            self._phase = ANSWER
            return True
        before, self._phase = self._phase, thinking.after(self._phase, token)
        if before == self._phase == THINKING and token not in self.request.params.stop_ids:
            self._reasoning += 1
        return False
