"""Service: what every handler shares: the model's parts, who may ask, and which requests are being answered."""

import hmac
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from starlette.requests import Request as HttpRequest

from pensar.base.config import Config
from pensar.base.errors import ConfigError, ModelError
from pensar.infer.budget import THINKING, Thinking
from pensar.infer.engine import Request, SamplingParams
from pensar.infer.generation import Generation
from pensar.infer.grammar import Grammars
from pensar.infer.request import checked_prompt
from pensar.serve.failure import ApiError, invalid
from pensar.serve.meter import Meter
from pensar.serve.metrics import ServerMetrics
from pensar.serve.tally import Totals
from pensar.serve.transport import read_body, timestamp
from pensar.serve.worker import Worker
from pensar.text.reply import ReplyParser
from pensar.text.tokenizer import THINK, Tokenizer

if TYPE_CHECKING:
    from pensar.serve.answer import Answer


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
    adapter_changes: bool = False
    """Whether clients may load and unload adapters; loading reads folders of the server's machine."""
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
    vocab_size: int
    """Of the model."""
    grammars: Grammars | None = None
    generation: Generation = field(default_factory=Generation)
    """How the model is sampled where a request says nothing."""
    meter: Meter | None = None
    """Where the usage of every request is written; None keeps no records."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """The loaded LoRA adapters and their folders, by the names that requests put into `model`."""
    running: "dict[str, Answer]" = field(default_factory=dict)
    """The requests that are being answered, by the ids of their replies."""
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

    def check_requests(self, requests: Sequence[Request]) -> None:
        """Raises ApiError (400) for parameters that the engine would refuse."""
        try:
            for request in requests:
                checked_prompt(request, self.vocab_size, self.context)
        except ModelError as error:
            raise invalid(f"{error}.") from error

    def count(self, totals: Totals, seconds: float) -> None:
        """Adds a request that has ended to the metrics."""
        metrics = self.metrics
        metrics.prompt_tokens.add(totals.prompt_tokens)
        metrics.cached_tokens.add(totals.cached_tokens)
        metrics.completion_tokens.add(totals.completion_tokens)
        metrics.reasoning_tokens.add(totals.reasoning_tokens)
        metrics.duration.observe(seconds)

    async def read(self, request: HttpRequest) -> bytes:
        """The body of an authorised request; raises ApiError (401, 413)."""
        self.authorize(request)
        return await read_body(request, self.config.max_body_bytes)

    def authorize(self, request: HttpRequest) -> None:
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

    def adapter_of(self, model: str | None) -> str:
        """The adapter that a request's `model` asks for: empty for the model itself, which no name means as well.

        Raises ApiError (404) for a name that is neither.
        """
        if model is None or model == self.config.model_name:
            return ""
        if model not in self.adapters:
            names = ", ".join(map(repr, (self.config.model_name, *self.adapters)))
            raise ApiError(
                404,
                f"The model {model!r} does not exist; this server has {names}.",
                kind="not_found_error",
                code="model_not_found",
                param="model",
            )
        return model

    def close(self) -> None:
        """Ends the engine's thread, then the meter; may be called twice."""
        self.worker.stop()
        if self.meter is not None:
            self.meter.close()

    def model_of(self, request: Request) -> str:
        """What a reply says of its model: the name that the request asked for."""
        return request.adapter or self.config.model_name


def fresh_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
