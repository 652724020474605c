"""From a request's fields to the engine's: mode, budget, limits, seeds, and defaults by mode.

Qwen3 wants other sampling for thinking than for direct answers (its documentation, "Best practices"); a value that
the request gives wins over both.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from pensar.base.files import seed_of
from pensar.infer.engine import SamplingParams
from pensar.infer.generation import Defaults, Generation
from pensar.serve.failure import invalid, overlong, unsupported
from pensar.serve.wire import MAX_STOPS, ChatRequest, SamplingFields, SentMessage
from pensar.text.chat import mode_of
from pensar.text.conversation import Conversation, Message, ToolCall

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions."""


RAW = Defaults(temperature=1.0, top_p=1.0, top_k=0)
"""Of /v1/completions, which continues a text rather than answers."""


def conversation_of(request: ChatRequest) -> Conversation:
    """The request's messages and tools in the product's own terms; raises ApiError where they cannot be expressed."""
    choice = request.tool_choice
    if choice is not None and choice not in ("auto", "none"):
        raise unsupported(
            "tool_choice", 'tool_choice must be "auto" or "none": this server cannot force a call.'
        )
    tools: tuple[dict[str, Any], ...] = ()
    if request.tools and choice != "none":
        tools = tuple(msgspec.to_builtins(tool) for tool in request.tools)
    messages = tuple(_message(sent, f"messages[{index}]") for index, sent in enumerate(request.messages))
    return Conversation(messages=messages, tools=tools)


def _message(sent: SentMessage, where: str) -> Message:
    calls = tuple(
        ToolCall(
            id=call.id,
            name=call.function.name,
            arguments=_arguments(call.function.arguments, f"{where}.tool_calls[{index}].function.arguments"),
        )
        for index, call in enumerate(sent.tool_calls or ())
    )
    if sent.content is None and not calls and sent.role != "assistant":
        raise invalid(f"{where}.content is missing; a {sent.role} message needs text.", f"{where}.content")
    if calls and sent.role != "assistant":
        raise invalid(
            f"{where}: only an assistant makes tool calls, not a {sent.role}.", f"{where}.tool_calls"
        )
    return Message(
        role="system" if sent.role == "developer" else sent.role,
        content=_text(sent, where),
        reasoning_content=sent.reasoning_content if sent.reasoning_content is not None else sent.reasoning,
        tool_calls=calls,
        tool_call_id=sent.tool_call_id,
        name=sent.name,
    )


def _text(sent: SentMessage, where: str) -> str:
    if not isinstance(sent.content, list):
        return sent.content or ""
    for index, part in enumerate(sent.content):
        if part.type not in ("text", "input_text", "refusal"):
            path = f"{where}.content[{index}]"
            raise invalid(f"{path} is of type {part.type!r}; this model reads text only.", f"{path}.type")
    return "".join(part.text or "" for part in sent.content)


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:  # ValidationError, for another type than an object, is a child of it
        raise invalid(f"{where} is not a JSON object: {error}.", where) from error


def chat_params(
    request: ChatRequest,
    conversation: Conversation,
    num_prompt_tokens: int,
    context: int,
    generation: Generation,
) -> list[SamplingParams]:
    """One set of engine parameters per choice, for a prompt of `num_prompt_tokens` in a window of `context` tokens."""
    _check_common(request)
    _check_chat(request)
    mode = request.thinking if request.thinking is not None else mode_of(conversation)
    limit = request.max_completion_tokens or request.max_tokens
    room = _room(num_prompt_tokens, limit, context)
    # With thinking off the prompt holds the closed block already; a budget would have nothing to cut.
    budget = None if request.thinking is False else request.thinking_budget
    shared = SamplingParams(
        max_tokens=room,
        stop_ids=generation.end_ids,
        thinking_budget=budget,
        logprobs=bool(request.logprobs),
    )
    return _params(request, generation.defaults(mode), shared)


def completion_params(
    request: SamplingFields, num_prompt_tokens: int, context: int, generation: Generation, *, logprobs: bool
) -> list[SamplingParams]:
    """The same for /v1/completions, where the text is continued as it is."""
    _check_common(request)
    room = _room(num_prompt_tokens, request.max_tokens or COMPLETION_MAX_TOKENS, context)
    return _params(
        request, RAW, SamplingParams(max_tokens=room, stop_ids=generation.end_ids, logprobs=logprobs)
    )


def _params(request: SamplingFields, defaults: Defaults, shared: SamplingParams) -> list[SamplingParams]:
    """`shared` once per choice, with how to draw filled in; only the seed differs."""
    seed = request.seed if request.seed is not None else secrets.randbits(62)
    top_k = defaults.top_k if request.top_k is None else max(0, request.top_k)
    return [
        msgspec.structs.replace(
            shared,
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_p=defaults.top_p if request.top_p is None else request.top_p,
            top_k=top_k,
            min_p=defaults.min_p if request.min_p is None else request.min_p,
            seed=seed_of("choice", seed, index),
        )
        for index in range(request.n or 1)
    ]


def _room(num_prompt_tokens: int, wanted: int | None, context: int) -> int:
    if num_prompt_tokens + (wanted or 1) > context:
        raise overlong(num_prompt_tokens, wanted or 0, context)
    return wanted or context - num_prompt_tokens


def _check_common(request: SamplingFields) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(request, name):
            raise unsupported(
                name, f"{name} {getattr(request, name)} is not supported; send 0 or leave it out."
            )
    if request.logit_bias:
        raise unsupported("logit_bias", "logit_bias is not supported; leave it out.")
    if len(request.stops) > MAX_STOPS:
        raise invalid(f"stop has {len(request.stops)} strings; at most {MAX_STOPS} are allowed.", "stop")
    if "" in request.stops:
        raise invalid("stop holds an empty string, which every text contains; drop it.", "stop")


def _check_chat(request: ChatRequest) -> None:
    if request.thinking_budget is not None and request.thinking_budget < 0:
        raise invalid(
            f"thinking_budget {request.thinking_budget} is negative; use 0 to close the thinking at once, or leave it "
            "out for no limit.",
            "thinking_budget",
        )
    if request.reasoning_effort is not None and request.reasoning_effort not in EFFORTS:
        allowed = ", ".join(EFFORTS)
        raise invalid(
            f"reasoning_effort {request.reasoning_effort!r} is not one of {allowed}.", "reasoning_effort"
        )
    if request.top_logprobs:
        raise unsupported(
            "top_logprobs", "top_logprobs is not supported beyond 0: only chosen tokens have logprobs."
        )
    if request.response_format is not None and request.response_format.type != "text":
        kind = request.response_format.type
        raise unsupported(
            "response_format", f"response_format {kind!r} is not supported; ask for JSON in a message."
        )


def flat_prompts(prompt: Any) -> Sequence[str | list[int]]:
    """The prompts of a completion request: a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(entry, str) for entry in prompt):
            return list(prompt)
        if all(_is_id(entry) for entry in prompt):
            return [list(prompt)]
        if all(isinstance(entry, list) and entry and all(map(_is_id, entry)) for entry in prompt):
            return [list(entry) for entry in prompt]
    raise invalid(
        "prompt must be a text, a list of texts, token ids, or a list of lists of token ids.", "prompt"
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
