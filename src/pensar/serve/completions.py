"""POST /v1/completions: a text or token ids in, their continuation out, whole or streamed."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from pensar.infer.engine import SamplingParams
from pensar.serve.failure import invalid, unsupported
from pensar.serve.reply import Reply
from pensar.serve.sampling import completion_params, flat_prompts
from pensar.serve.service import Answer, Service, fresh_id
from pensar.serve.transport import (
    KEEP_ALIVE,
    ClientGone,
    EventStream,
    JsonResponse,
    event,
    timestamp,
    while_connected,
)
from pensar.serve.wire import CompletionRequest, TextChoice, TextCompletion, TextLogprobs, read_request

MAX_SEQUENCES = 256
"""Prompts times `n` of one request."""


async def answer_completion(service: Service, request: Request) -> Response:
    """The response to a completion request; raises ApiError for one that cannot be served."""
    asked = read_request(await service.read(request), CompletionRequest)
    service.check_model(asked.model)
    _check(asked)
    prompts, sequences = await asyncio.to_thread(_prepare, service, asked)
    replies = [Reply(service.tokenizer, None, asked.stops) for _ in sequences]
    answer = Answer(service, sequences, replies, sum(map(len, prompts)))
    choices_each = len(sequences) // len(prompts)
    echoes = [""] * len(sequences)
    if asked.echo:
        echoes = [service.tokenizer.decode(prompt) for prompt in prompts for _ in range(choices_each)]
    if asked.stream:
        return EventStream(_events(service, asked, answer, echoes), answer.close, answer.abandon)
    try:
        await while_connected(request.receive, answer.finish())
    except ClientGone:
        answer.abandon()
        raise
    return JsonResponse(
        TextCompletion(
            id=fresh_id("cmpl"),
            created=timestamp(),
            model=service.config.model_name,
            choices=[
                TextChoice(
                    index=index,
                    text=echo + reply.content,
                    finish_reason=reply.finish_reason,
                    logprobs=None if asked.logprobs is None else _logprobs(reply, 0),
                )
                for index, (echo, reply) in enumerate(zip(echoes, replies, strict=True))
            ],
            usage=answer.usage(),
        )
    )


def _check(asked: CompletionRequest) -> None:
    if asked.suffix:
        raise unsupported("suffix", "suffix is not supported; the model continues a text at its end.")
    if asked.logprobs:
        raise unsupported(
            "logprobs", "logprobs above 0 is not supported: only chosen tokens have logprobs; send 0."
        )
    if asked.echo and asked.logprobs is not None:
        raise unsupported("echo", "echo together with logprobs is not supported; leave out one of them.")


def _prepare(
    service: Service, asked: CompletionRequest
) -> tuple[list[list[int]], list[tuple[list[int], SamplingParams]]]:
    """The prompts' tokens, and per choice (prompt after prompt) its tokens and parameters."""
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
    if len(prompts) * (asked.n or 1) > MAX_SEQUENCES:
        raise invalid(
            f"{len(prompts)} prompts times n is over the limit of {MAX_SEQUENCES} sequences.", "prompt"
        )
    sequences = []
    for tokens in prompts:
        params = completion_params(
            asked, len(tokens), service.context, service.generation, logprobs=asked.logprobs is not None
        )
        sequences.extend([(tokens, each) for each in params])
    return prompts, sequences


def _logprobs(reply: Reply, offset: int) -> TextLogprobs:
    """The accounts' entries in this endpoint's shape; `offset` is the first token's place in the text."""
    tokens = [entry.token for entry in reply.accounts.logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return TextLogprobs(
        tokens=tokens,
        token_logprobs=[entry.logprob for entry in reply.accounts.logprobs],
        text_offset=offsets,
    )


async def _events(
    service: Service, asked: CompletionRequest, answer: Answer, echoes: list[str]
) -> AsyncGenerator[bytes]:
    identifier, created, model = fresh_id("cmpl"), timestamp(), service.config.model_name
    offsets = [len(echo) for echo in echoes]

    def chunk(choice: TextChoice) -> bytes:
        reply = answer.replies[choice.index]
        if asked.logprobs is not None and reply.accounts.logprobs:
            choice.logprobs = _logprobs(reply, offsets[choice.index])
            offsets[choice.index] += sum(map(len, choice.logprobs.tokens))
            reply.accounts.logprobs = []
        return event(TextCompletion(id=identifier, created=created, model=model, choices=[choice]))

    for index, echo in enumerate(echoes):
        if echo:
            yield chunk(TextChoice(index=index, text=echo))
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
