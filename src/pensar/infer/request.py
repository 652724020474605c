"""Request in, Piece and Completion out: what the engine exchanges with its callers."""

import math
from collections.abc import Iterator, Sequence
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
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_ADJUSTED = 4_096
"""Tokens with a bias, and tokens that are banned, at most."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer has to match; text inside the thinking block is free."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "ebnf", "tools"]
    text: str = ""
    """The schema as JSON; nothing; a regular expression of the whole answer; a JSON list of strings; rules in Lark's or
    GBNF's notation; or a JSON object with `tools`, `tool_choice` and `parallel_tool_calls` as in OpenAI's API."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one reply is drawn: penalties, bias and bans, then temperature, then top-k, then top-p, then min-p."""

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
    adaptive_budget: float = 0.0
    """A thinking budget that suffices for this share of questions like this one, as the model has learned it; 0 for
    none. `thinking_budget` stays the most."""
    logprobs: bool = False
    """Report each token's log-probability."""
    top_logprobs: int = 0
    """Report so many of the likeliest tokens at every place; implies `logprobs`."""
    prompt_logprobs: bool = False
    """Report the log-probability of every token of the prompt as well, and with `top_logprobs` the likeliest tokens at
    its places; its beginning is then computed anew."""
    ignore_eos: bool = False
    """Only stop_ids and max_tokens end the reply, not the tokenizer's ends of turn and text."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the reply has, -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token as often as the reply has it, -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt and reply and multiplies the negative ones, 0.01 to 100."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens, -100 to 100."""
    bad_ids: tuple[int, ...] = ()
    """Tokens that are never drawn."""
    min_tokens: int = 0
    """Tokens of the reply before which no token may end it; a grammar that is complete ends it all the same."""
    min_thinking: int = 0
    """Reasoning tokens before which the thinking block is not closed."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply where they are complete, looked for after the thinking block."""
    grammar: Grammar | None = None


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


class Piece(msgspec.Struct, frozen=True, kw_only=True, gc=False):
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
    prompt_top_logprobs: list[TopLogprobs] | None = None
    """The same for the likeliest tokens, none for the first."""
    stopped_at: int | None = None
    """Character of the reply's text, control tokens left out, at which the stop string begins that ended it."""
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
    reasoning_left: int | None = None
    num_cached_tokens: int = 0
    version: int = 0
    """Of the weights that the last token was drawn from."""
    top_logprobs: list[TopLogprobs] = msgspec.field(default_factory=list)
    prompt_logprobs: list[float] = msgspec.field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs] = msgspec.field(default_factory=list)
    stopped_at: int | None = None
    error: str | None = None


def piece_of(
    name: str,
    completion: Completion,
    start: int,
    reason: FinishReason | None,
    *,
    first: bool | None = None,
) -> Piece:
    """The tokens of a completion from `start` on; what is said once goes with the first."""
    first = start == 0 if first is None else first
    return Piece(
        id=name,
        tokens=completion.tokens[start:],
        logprobs=completion.logprobs[start:] if completion.logprobs else None,
        forced=completion.forced[start:],
        finish_reason=reason,
        reasoning_tokens=completion.num_reasoning_tokens,
        reasoning_left=completion.reasoning_left,
        cached_tokens=completion.num_cached_tokens,
        version=completion.version,
        top_logprobs=completion.top_logprobs[start:] or None,
        prompt_logprobs=(completion.prompt_logprobs or None) if first else None,
        prompt_top_logprobs=(completion.prompt_top_logprobs or None) if first else None,
        stopped_at=completion.stopped_at if reason is not None else None,
        error=completion.error,
    )


def known_part(completion: Completion) -> Completion:
    """A reply that ends early, up to the first token whose log-probability was asked for and not computed yet."""
    stop = next((at for at, value in enumerate(completion.logprobs) if math.isnan(value)), None)
    if stop is None:
        return completion
    return msgspec.structs.replace(
        completion,
        tokens=completion.tokens[:stop],
        logprobs=completion.logprobs[:stop],
        forced=completion.forced[:stop],
        top_logprobs=completion.top_logprobs[:stop],
    )


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
        ("adaptive_budget", params.adaptive_budget, 0, 1),
        ("top_logprobs", params.top_logprobs, 0, MAX_TOP_LOGPROBS),
    ]
    if params.thinking_budget is not None:
        limits.append(("thinking_budget", params.thinking_budget, 0, math.inf))
    limits.extend(("stop_ids", stop, 0, vocab_size - 1) for stop in params.stop_ids)
    limits.extend(_limits_of_constraints(params, vocab_size))
    for field, value, low, high in limits:
        if not low <= value <= high or value == math.inf:
            upper = "" if high == math.inf else f" and at most {high}"
            raise ModelError(f"{name} has {field} {value}; it must be at least {low}{upper}")
    _check_combinations(name, params)


def _limits_of_constraints(
    params: SamplingParams, vocab_size: int
) -> Iterator[tuple[str, float, float, float]]:
    """Field, value, lowest and highest of what goes beyond temperature and filters."""
    yield "presence_penalty", params.presence_penalty, -2, 2
    yield "frequency_penalty", params.frequency_penalty, -2, 2
    yield "repetition_penalty", params.repetition_penalty, 0.01, 100
    yield "min_tokens", params.min_tokens, 0, params.max_tokens
    yield "min_thinking", params.min_thinking, 0, params.max_tokens
    yield "number of bad_ids", len(params.bad_ids), 0, MAX_ADJUSTED
    yield "number of tokens in logit_bias", len(params.logit_bias), 0, MAX_ADJUSTED
    yield "number of stop strings", len(params.stop), 0, MAX_STOPS
    for text in params.stop:
        yield "a stop string with a length of", len(text), 1, MAX_STOP_LENGTH
    for token in params.bad_ids:
        yield "bad_ids", token, 0, vocab_size - 1
    for token, bias in params.logit_bias:
        yield "a logit_bias for token", token, 0, vocab_size - 1
        yield f"a logit_bias for token {token} of", bias, -100, 100


def _check_combinations(name: str, params: SamplingParams) -> None:
    """What contradicts itself."""
    budget = params.thinking_budget
    if budget is not None and params.min_thinking > budget:
        raise ModelError(
            f"{name} has min_thinking {params.min_thinking} above its thinking_budget {budget}; lower min_thinking"
        )
    if params.grammar is not None and params.ignore_eos:
        raise ModelError(
            f"{name} has ignore_eos with a grammar, whose end would end nothing; leave out one of them"
        )
    if len({token for token, _ in params.logit_bias}) < len(params.logit_bias):
        raise ModelError(f"{name} has a token twice in logit_bias; give each one bias")
