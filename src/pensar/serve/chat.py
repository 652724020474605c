"""POST /v1/chat/completions: conversations in, thinking, answers and tool calls out, whole or streamed."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pensar.base.errors import PensarError
from pensar.infer.engine import Request
from pensar.serve.answer import Answer, complete
from pensar.serve.beams import BeamAnswer, check_beams
from pensar.serve.failure import invalid
from pensar.serve.reply import Reply
from pensar.serve.sampling import chat_params, conversation_of, requests_of
from pensar.serve.service import Service, fresh_id
from pensar.serve.transport import (
    KEEP_ALIVE,
    EventStream,
    JsonResponse,
    event,
    timestamp,
)
from pensar.serve.wire import (
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    Logprobs,
    ReplyMessage,
    Usage,
    read_request,
)
from pensar.text.chat import encode_prompt
from pensar.text.conversation import ToolCall
from pensar.text.reply import Delta


async def answer_chat(service: Service, request: HttpRequest) -> Response:
    """The response to a chat request; raises ApiError for one that cannot be served."""
    asked = read_request(await service.read(request), ChatRequest)
    adapter, name = service.adapter_of(asked.model), fresh_id("chatcmpl")
    beams = check_beams(asked)
    # A long conversation takes a while to encode; the other clients' streams must not wait for it.
    requests, tools = await asyncio.to_thread(_prepare, service, asked, name, adapter)

    def reply_to(each: Request) -> Reply:
        return Reply(service.tokenizer, service.parser(each.tokens), asked.stops, tools=tools)

    if beams:
        search = BeamAnswer(service, requests[:1], asked, name, reply_to)
        await complete(search, request.receive)
        return JsonResponse(_completion(service, asked, requests[0], search.replies[0], name, search.usage()))
    answer = Answer(service, name, requests, [reply_to(each) for each in requests], 1)
    if asked.stream:
        return EventStream(_events(service, asked, answer), answer.close, answer.abandon)
    await complete(answer, request.receive)
    return JsonResponse(_completion(service, asked, requests[0], answer.replies, name, answer.usage()))


def _prepare(service: Service, asked: ChatRequest, name: str, adapter: str) -> tuple[list[Request], bool]:
    """A sequence per choice, and whether tools are on offer."""
    conversation = conversation_of(asked)
    try:
        tokens = encode_prompt(service.tokenizer, conversation, thinking=asked.thinking)
    except PensarError as error:
        raise invalid(str(error), "messages") from error
    params = chat_params(asked, conversation, len(tokens), service.context, service.generation)
    requests = requests_of(name, asked, adapter, [(tokens, each) for each in params])
    service.check_requests(requests)
    service.check_grammar(params[0])
    return requests, bool(conversation.tools)


def _completion(
    service: Service, asked: ChatRequest, request: Request, replies: Sequence[Reply], name: str, total: Usage
) -> ChatCompletion:
    choices = []
    for index, reply in enumerate(replies):
        assert reply.finish_reason is not None
        message = ReplyMessage(
            role="assistant",
            content=reply.content or (None if reply.tool_calls else ""),
            reasoning_content=reply.reasoning or None,
        )
        if reply.tool_calls:
            message.tool_calls = [_call(call) for call in reply.tool_calls]
        logprobs = Logprobs(content=reply.accounts.logprobs) if asked.logprobs else None
        choices.append(
            ChatChoice(index=index, message=message, finish_reason=reply.finish_reason, logprobs=logprobs)
        )
    return ChatCompletion(
        id=name,
        created=timestamp(),
        model=service.model_of(request),
        choices=choices,
        usage=total,
    )


async def _events(service: Service, asked: ChatRequest, answer: Answer) -> AsyncGenerator[bytes]:
    identifier, created, model = answer.id, timestamp(), service.model_of(answer.requests[0])
    num_calls = [0] * len(answer.replies)

    def chunk(index: int, delta: ReplyMessage, last: bool = False) -> bytes:
        reply = answer.replies[index]
        choice = ChatChunkChoice(index=index, delta=delta)
        if last:
            choice.finish_reason = reply.finish_reason
        if asked.logprobs and reply.accounts.logprobs:
            choice.logprobs = Logprobs(content=reply.accounts.logprobs)
            reply.accounts.logprobs = []
        return event(ChatChunk(id=identifier, created=created, model=model, choices=[choice]))

    for index in range(len(answer.replies)):
        yield chunk(index, ReplyMessage(role="assistant", content=""))
    async with aclosing(answer.deltas()) as arriving:
        async for arrived in arriving:
            if arrived is None:
                yield KEEP_ALIVE
                continue
            index, deltas = arrived
            for delta in deltas:
                for message in _messages(delta, num_calls, index):
                    yield chunk(index, message)
            if answer.replies[index].finish_reason is not None:
                yield chunk(index, ReplyMessage(), last=True)
    if asked.include_usage:
        total = answer.usage()
        yield event(ChatChunk(id=identifier, created=created, model=model, choices=[], usage=total))


def _messages(delta: Delta, num_calls: list[int], index: int) -> list[ReplyMessage]:
    """The wire's form of a delta; a tool call takes two, first its name and then its arguments."""
    if delta.tool_call is None:
        if delta.kind == "reasoning":
            return [ReplyMessage(reasoning_content=delta.text)]
        return [ReplyMessage(content=delta.text)]
    call, number = _call(delta.tool_call), num_calls[index]
    num_calls[index] += 1
    arguments = call.function["arguments"]
    call.index, call.function = number, {**call.function, "arguments": ""}
    rest = CallDelta(index=number, function={"arguments": arguments})
    return [ReplyMessage(tool_calls=[call]), ReplyMessage(tool_calls=[rest])]


def _call(call: ToolCall) -> CallDelta:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return CallDelta(id=call.id, type="function", function={"name": call.name, "arguments": arguments})
