"""POST /v1/completions: a text or token ids in, their continuation out, whole or streamed."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pensar.infer.choices import mean_of_drawn
from pensar.infer.engine import Request, SamplingParams
from pensar.infer.request import MAX_TOP_LOGPROBS
from pensar.serve.answer import Answer, complete
from pensar.serve.beams import BeamAnswer, check_beams
from pensar.serve.failure import invalid, unsupported
from pensar.serve.reply import Reply
from pensar.serve.sampling import completion_params, flat_prompts, requests_of
from pensar.serve.service import Service, fresh_id
from pensar.serve.transport import (
    KEEP_ALIVE,
    EventStream,
    JsonResponse,
    event,
    timestamp,
)
from pensar.serve.wire import (
    CompletionRequest,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    Usage,
    read_request,
)

MAX_SEQUENCES = 256
"""Prompts times `n`, or `best_of`, of one request."""


class Echo(NamedTuple):
    """A prompt that comes back before its continuation."""

    text: str = ""
    entries: Sequence[TokenLogprob] = ()
    """Of its tokens, where they were scored; nothing comes before the first, whose own says nothing."""


async def answer_completion(service: Service, request: HttpRequest) -> Response:
    """The response to a completion request; raises ApiError for one that cannot be served."""
    asked = read_request(await service.read(request), CompletionRequest)
    adapter, name = service.adapter_of(asked.model), fresh_id("cmpl")
    _check(asked)
    beams = check_beams(asked)
    prompts, requests = await asyncio.to_thread(_prepare, service, asked, name, adapter)
    each = len(requests) // len(prompts)
    echoes = [Echo(service.tokenizer.decode(prompt)) if asked.echo else Echo() for prompt in prompts]

    def reply_to(request: Request) -> Reply:
        return Reply(service.tokenizer, None, asked.stops, prompt=request.tokens)

    if beams:
        search = BeamAnswer(service, requests[::each], asked, name, reply_to)
        await complete(search, request.receive)
        return JsonResponse(_completion(service, asked, requests[0], search.replies, echoes, search.usage()))
    answer = Answer(service, name, requests, [reply_to(one) for one in requests], len(prompts))
    if asked.stream:
        echoes = [echo for echo in echoes for _ in range(each)]
        return EventStream(_events(service, asked, answer, echoes), answer.close, answer.abandon)
    await complete(answer, request.receive)
    groups = [answer.replies[start : start + each] for start in range(0, len(requests), each)]
    best = [_best(group, asked.n or 1) for group in groups]
    if asked.echo and asked.logprobs is not None:
        scored = await asyncio.to_thread(lambda: [group[0].scored_prompt() for group in groups])
        echoes = [Echo(echo.text, entries) for echo, entries in zip(echoes, scored, strict=True)]
    return JsonResponse(_completion(service, asked, requests[0], best, echoes, answer.usage()))


def _best(replies: Sequence[Reply], n: int) -> Sequence[Reply]:
    """The `n` with the highest log-probability per token, the highest first; all of them as they are if no more."""
    if len(replies) == n:
        return replies
    return sorted(replies, key=lambda reply: -mean_of_drawn(reply.accounts.values, reply.accounts.forced))[:n]


def _completion(
    service: Service,
    asked: CompletionRequest,
    request: Request,
    groups: Sequence[Sequence[Reply]],
    echoes: Sequence[Echo],
    total: Usage,
) -> TextCompletion:
    """Prompt after prompt the replies to it."""
    pairs = [(echo, reply) for echo, replies in zip(echoes, groups, strict=True) for reply in replies]
    choices = [
        TextChoice(
            index=index,
            text=echo.text + reply.content,
            finish_reason=reply.finish_reason,
            logprobs=None if asked.logprobs is None else _logprobs(asked, reply, 0, echo.entries),
        )
        for index, (echo, reply) in enumerate(pairs)
    ]
    return TextCompletion(
        id=request.id.rpartition("-")[0],
        created=timestamp(),
        model=service.model_of(request),
        choices=choices,
        usage=total,
    )


def _check(asked: CompletionRequest) -> None:
    n = asked.n or 1
    if asked.best_of is not None and asked.best_of < n:
        raise invalid(f"best_of {asked.best_of} is less than n {n}; raise it, or leave it out.", "best_of")
    if asked.best_of is not None and asked.best_of > n:
        if asked.stream:
            raise unsupported(
                "best_of",
                "best_of above n cannot be streamed: which is best is known at the end; leave out one.",
            )
        if asked.temperature == 0:
            raise invalid(
                f"best_of {asked.best_of} at temperature 0, where all replies are the same; raise it.",
                "best_of",
            )
    if asked.suffix:
        raise unsupported("suffix", "suffix is not supported; the model continues a text at its end.")
    if asked.logprobs is not None and not 0 <= asked.logprobs <= MAX_TOP_LOGPROBS:
        raise invalid(
            f"logprobs {asked.logprobs} must be at least 0 and at most {MAX_TOP_LOGPROBS}.", "logprobs"
        )
    if asked.echo and asked.logprobs is not None and asked.stream:
        raise unsupported(
            "echo",
            "echo with logprobs cannot be streamed: the prompt's are known when all of it is; leave out one.",
        )


def _prepare(
    service: Service, asked: CompletionRequest, name: str, adapter: str
) -> tuple[list[list[int]], list[Request]]:
    """The prompts' tokens, and a sequence per choice, prompt after prompt."""
    tokenizer = service.tokenizer
    prompts = []
    for prompt in flat_prompts(asked.prompt):
        tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not tokens:
            raise invalid("prompt is empty; give at least one character or token.", "prompt")
        strange = [token for token in tokens if not 0 <= token < tokenizer.vocab_size]
        if strange:
            raise invalid(
                f"prompt has token {strange[0]}; ids go from 0 to {tokenizer.vocab_size - 1}.", "prompt"
            )
        prompts.append(tokens)
    if len(prompts) * (asked.best_of or asked.n or 1) > MAX_SEQUENCES:
        raise invalid(
            f"{len(prompts)} prompts times n, or best_of, is over the limit of {MAX_SEQUENCES} sequences.",
            "prompt",
        )
    sequences: list[tuple[list[int], SamplingParams]] = []
    for tokens in prompts:
        params = completion_params(asked, len(tokens), service.context, service.generation)
        sequences.extend([(tokens, each) for each in params])
        service.check_grammar(params[0])
    requests = requests_of(name, asked, adapter, sequences)
    service.check_requests(requests)
    return prompts, requests


def _logprobs(
    asked: CompletionRequest, reply: Reply, offset: int, prompt: Sequence[TokenLogprob] = ()
) -> TextLogprobs:
    """The entries in this endpoint's shape; `offset` is the first token's place in the text."""
    entries = [*prompt, *reply.accounts.logprobs]
    tokens = [entry.token for entry in entries]
    values: list[float | None] = [entry.logprob for entry in entries]
    tops: list[dict[str, float] | None] = [_by_text(entry) for entry in entries]
    if prompt:
        values[0] = tops[0] = None
    return TextLogprobs(
        tokens=tokens,
        token_logprobs=values,
        text_offset=list(accumulate(map(len, tokens), initial=offset))[:-1],
        top_logprobs=tops if asked.logprobs else None,
    )


def _by_text(entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens; of those with the same text (parts of a character) the one that stands there, or else the
    likeliest of them."""
    found: dict[str, float] = {}
    for top in entry.top_logprobs:
        found.setdefault(top.token, top.logprob)
    return found | {entry.token: entry.logprob}


async def _events(
    service: Service, asked: CompletionRequest, answer: Answer, echoes: list[Echo]
) -> AsyncGenerator[bytes]:
    identifier, created, model = answer.id, timestamp(), service.model_of(answer.requests[0])
    offsets = [len(echo.text) for echo in echoes]

    def chunk(choice: TextChoice) -> bytes:
        reply = answer.replies[choice.index]
        if asked.logprobs is not None and reply.accounts.logprobs:
            choice.logprobs = _logprobs(asked, reply, offsets[choice.index])
            offsets[choice.index] += sum(map(len, choice.logprobs.tokens))
            reply.accounts.logprobs = []
        return event(TextCompletion(id=identifier, created=created, model=model, choices=[choice]))

    for index, echo in enumerate(echoes):
        if echo.text:
            yield chunk(TextChoice(index=index, text=echo.text))
    async with aclosing(answer.deltas()) as arriving:
        async for arrived in arriving:
            if arrived is None:
                yield KEEP_ALIVE
                continue
            index, deltas = arrived
            text = "".join(delta.text for delta in deltas)
            reason = answer.replies[index].finish_reason
            if text or reason:
                yield chunk(TextChoice(index=index, text=text, finish_reason=reason))
    if asked.include_usage:
        total = answer.usage()
        yield event(TextCompletion(id=identifier, created=created, model=model, choices=[], usage=total))
