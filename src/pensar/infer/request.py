"""Request in, Piece and Completion out: what the engine exchanges with its callers."""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from pensar.base.errors import ModelError

Ints = npt.NDArray[np.int64]

FinishReason = Literal["stop", "length", "error", "abort", "deadline"]
"""A stop token, the limit of tokens, a failure of this request alone, taken out by the caller, or out of time."""

TopLogprobs = list[tuple[int, float]]
"""The likeliest tokens at one place with their log-probabilities, the likeliest first."""

MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one reply is drawn: temperature, then top-k, then top-p, then min-p."""

    max_tokens: int
    """Limit for the reply, forced tokens and the stop token included."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one."""
    seed: int = 0
    """Equal seeds give equal draws from equal logits, whatever else is in the batch."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the reply besides the tokenizer's ends of turn and text."""
    thinking_budget: int | None = None
    """Reasoning tokens after which the thinking is closed by the stop sentence; None for no limit."""
    logprobs: bool = False
    """Report each token's log-probability."""
    top_logprobs: int = 0
    """Report so many of the likeliest tokens at every place; implies `logprobs`."""
    prompt_logprobs: bool = False
    """Report the log-probability of every token of the prompt as well; its beginning is then computed anew."""
    ignore_eos: bool = False
    """Only stop_ids and max_tokens end the reply, not the tokenizer's ends of turn and text."""


class Request(msgspec.Struct, frozen=True):
    """A prompt to continue; `id` is unique among the engine's unfinished requests."""

    id: str
    tokens: Sequence[int]
    params: SamplingParams
    adapter: str = ""
    """Name of a LoRA adapter that the engine has loaded; empty for the model itself."""
    user: str = ""
    """Whom the engine is fair to: while several wait, the one served least is next."""
    priority: int = 0
    """Lower numbers go first, and may take the place of running requests with higher ones."""
    timeout_seconds: float | None = None
    """Time after submission at which the request ends as it is, with finish_reason "deadline"."""
    salt: str = ""
    """Only requests with equal salts share what is in the cache, so that its speed tells nobody of others' texts."""


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What one step added to one request."""

    id: str
    tokens: list[int]
    """Includes the stop token."""
    logprobs: list[float] | None
    """Of `tokens`, under the model's own distribution (temperature 1, unfiltered); None unless asked for."""
    forced: list[bool]
    """Which of `tokens` the thinking budget put there."""
    finish_reason: FinishReason | None
    reasoning_tokens: int
    """Sampled inside the thinking block since the request began; the tags do not count."""
    reasoning_left: int | None = None
    """What is left of the thinking budget; None without one."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the cache already."""
    version: int = 0
    """Of the weights that `tokens` were drawn from: how often the engine had loaded new ones."""
    top_logprobs: list[TopLogprobs] | None = None
    """Per token of `tokens`; None unless asked for."""
    prompt_logprobs: list[float] | None = None
    """Of every token of the prompt, 0 for the first; in a request's first piece alone, where asked for."""
    error: str | None = None
    """Why the request failed, where finish_reason is "error"."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole reply; the fields mean what they mean in a Piece."""

    tokens: list[int]
    logprobs: list[float]
    """Empty unless asked for."""
    forced: list[bool]
    finish_reason: FinishReason
    num_reasoning_tokens: int = 0
    num_cached_tokens: int = 0
    version: int = 0
    """Of the weights that the last token was drawn from."""
    top_logprobs: list[TopLogprobs] = msgspec.field(default_factory=list)
    prompt_logprobs: list[float] = msgspec.field(default_factory=list)
    error: str | None = None


def checked_prompt(request: Request, vocab_size: int, max_positions: int) -> Ints:
    """The prompt as an array; ModelError where the model cannot serve the request."""
    name = f"request {request.id}"
    _check_params(name, request.params, vocab_size)
    tokens = checked_tokens(name, request.tokens, vocab_size)
    total = tokens.size + request.params.max_tokens
    if total > max_positions:
        raise ModelError(
            f"{name} needs {total:,} positions ({tokens.size:,} of its prompt and max_tokens "
            f"{request.params.max_tokens:,}), the limit is {max_positions:,}; shorten the prompt or lower max_tokens"
        )
    return tokens


def checked_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> Ints:
    """Token ids as an array; ModelError, which begins with `name`, where the model has no such tokens."""
    array = np.asarray(tokens)
    if array.size == 0:
        raise ModelError(f"{name} is empty; give at least one token")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ModelError(
            f"{name} holds {array.dtype} in {array.ndim} dimensions; give a flat list of token ids"
        )
    for position in (int(array.argmin()), int(array.argmax())):
        if not 0 <= array[position] < vocab_size:
            raise ModelError(
                f"{name} has token {array[position]} at position {position}, the model knows 0 to {vocab_size - 1:,}; "
                "encode the prompt with the model's own tokenizer"
            )
    return array.astype(np.int64)


def _check_params(name: str, params: SamplingParams, vocab_size: int) -> None:
    limits: list[tuple[str, float, float, float]] = [
        ("max_tokens", params.max_tokens, 1, math.inf),
        ("temperature", params.temperature, 0, math.inf),
        ("top_k", params.top_k, 0, math.inf),
        ("top_p", params.top_p, 0, 1),
        ("min_p", params.min_p, 0, 1),
        ("seed", params.seed, 0, MAX_SEED),
        ("top_logprobs", params.top_logprobs, 0, MAX_TOP_LOGPROBS),
    ]
    if params.thinking_budget is not None:
        limits.append(("thinking_budget", params.thinking_budget, 0, math.inf))
    limits.extend(("stop_ids", stop, 0, vocab_size - 1) for stop in params.stop_ids)
    for field, value, low, high in limits:
        if not low <= value <= high or value == math.inf:
            upper = "" if high == math.inf else f" and at most {high}"
            raise ModelError(f"{name} has {field} {value}; it must be at least {low}{upper}")
