"""Service: what every handler shares, and the way of a job from the engine to its replies."""

import hmac
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import numpy as np
from starlette.requests import Request

from pensar.base.config import Config
from pensar.base.errors import ConfigError, ModelError
from pensar.infer.budget import THINKING, Thinking
from pensar.infer.engine import SamplingParams
from pensar.infer.generation import Generation
from pensar.infer.grammar import Grammars
from pensar.serve.failure import ApiError, invalid
from pensar.serve.metrics import ServerMetrics
from pensar.serve.reply import Reply
from pensar.serve.transport import read_body, timestamp
from pensar.serve.wire import Usage, usage
from pensar.serve.worker import Worker
from pensar.text.reply import Delta, ReplyParser
from pensar.text.tokenizer import THINK, Tokenizer


class ServeConfig(Config, frozen=True):
    """How the server meets its clients."""

    model_name: str
    """What clients put into `model`."""
    api_key: str | None = None
    """Bearer token that /v1 asks for; None lets everybody in."""
    max_waiting: int = 256
    """Sequences that may wait for a place in the batch; more are answered 429."""
    max_body_bytes: int = 8 * 1024 * 1024
    keep_alive_seconds: float = 15.0
    """Silence on a stream after which a comment is sent."""
    drain_seconds: float = 30.0
    """Time that running requests get to finish after SIGTERM."""
    max_silence_seconds: float = 120.0
    """An engine step that takes longer than this makes /health fail."""

    def __post_init__(self) -> None:
        if self.max_waiting < 0:
            raise ConfigError(
                f"max_waiting {self.max_waiting} is negative; use 0 to refuse whatever does not fit at once"
            )
        if self.api_key is not None and not self.api_key:
            raise ConfigError("api_key is empty; give a non-empty key or leave it out to let everybody in")


@dataclass(frozen=True)
class Service:
    """The parts that the handlers work with; made once per server."""

    config: ServeConfig
    tokenizer: Tokenizer
    worker: Worker
    metrics: ServerMetrics
    context: int
    """Tokens that prompt and reply may have together."""
    grammars: Grammars | None = None
    generation: Generation = field(default_factory=Generation)
    """How the model is sampled where a request says nothing."""
    created: int = field(default_factory=timestamp)

    def parser(self, prompt: Sequence[int]) -> ReplyParser:
        """A parser for a reply to `prompt`, which may end inside a thinking block where the template opens it."""
        if THINK not in self.tokenizer.control_tokens:
            return ReplyParser()
        phase = Thinking(self.tokenizer).phase_of(np.asarray(prompt, np.int64))
        return ReplyParser(thinking=phase == THINKING)

    def check_grammar(self, params: SamplingParams) -> None:
        """Compiles a request's grammar, which may take seconds; raises ApiError (400) for one that cannot be used."""
        if params.grammar is None:
            return
        try:
            if self.grammars is None:
                raise ModelError("this server has no tokenizer for grammars")
            self.grammars.compiled(params.grammar)
        except ModelError as error:
            raise invalid(f"The answer's grammar cannot be used: {error}.", "response_format") from error

    async def read(self, request: Request) -> bytes:
        """The body of an authorised request; raises ApiError (401, 413)."""
        self.authorize(request)
        return await read_body(request, self.config.max_body_bytes)

    def authorize(self, request: Request) -> None:
        """Raises ApiError (401) unless the request carries the server's key."""
        if self.config.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        expected = self.config.api_key.encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), expected):
            raise ApiError(
                401,
                "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
                kind="authentication_error",
                code="invalid_api_key",
            )

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for another model than the served one; no name means that one."""
        if name is not None and name != self.config.model_name:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has {self.config.model_name!r}.",
                kind="not_found_error",
                code="model_not_found",
                param="model",
            )


def fresh_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


class Answer:
    """One request in work: its sequences in the engine and their replies, in the order of the choices."""

    def __init__(
        self,
        service: Service,
        sequences: Sequence[tuple[Sequence[int], SamplingParams]],
        replies: Sequence[Reply],
        prompt_tokens: int,
    ) -> None:
        self._service = service
        self._sequences = sequences
        self.replies = replies
        self.prompt_tokens = prompt_tokens
        self._started = time.monotonic()
        self._job = service.worker.submit(sequences)

    @property
    def completion_tokens(self) -> int:
        return sum(reply.accounts.completion_tokens for reply in self.replies)

    @property
    def reasoning_tokens(self) -> int:
        return sum(reply.accounts.reasoning_tokens for reply in self.replies)

    def usage(self) -> Usage:
        cached = max((reply.accounts.cached_tokens for reply in self.replies), default=0)
        return usage(self.prompt_tokens, self.completion_tokens, self.reasoning_tokens, cached)

    async def deltas(self) -> AsyncGenerator[tuple[int, list[Delta]] | None]:
        """(choice, deltas) as the engine makes them; None after each `keep_alive_seconds` of silence.

        Takes the sequences out of the engine when it is closed or cancelled early; that needs no await, as an
        await in a cancelled task would be cancelled itself.
        """
        first = True
        try:
            while any(reply.finish_reason is None for reply in self.replies):
                parts = await self._job.next(self._service.config.keep_alive_seconds)
                if first and parts:
                    self._service.metrics.first_token.observe(time.monotonic() - self._started)
                    first = False
                for part in parts:
                    reply = self.replies[part.index]
                    if reply.finish_reason is not None:
                        continue
                    deltas = reply.feed(part.piece)
                    if reply.stopped:
                        self._job.abort(part.index)
                    yield part.index, deltas
                if not parts:
                    yield None
        finally:
            self._job.abort()
            self._settle()

    async def finish(self) -> None:
        """Runs to the end; the replies then hold everything."""
        async for _ in self.deltas():
            pass

    def abandon(self) -> None:
        """Counts a client that left."""
        self._service.metrics.aborted.add()

    def close(self) -> None:
        """For an answer whose `deltas` may never have been started."""
        self._job.abort()

    def _settle(self) -> None:
        metrics = self._service.metrics
        metrics.prompt_tokens.add(self.prompt_tokens)
        metrics.completion_tokens.add(self.completion_tokens)
        metrics.reasoning_tokens.add(self.reasoning_tokens)
        metrics.duration.observe(time.monotonic() - self._started)
