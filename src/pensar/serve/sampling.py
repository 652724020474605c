"""From a request's fields to the engine's: mode, budget, limits, seeds, and defaults by mode.

Qwen3 wants other sampling for thinking than for direct answers (its documentation, "Best practices"); a value that
the request gives wins over both.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from pensar.base.files import seed_of
from pensar.infer.engine import Request, SamplingParams
from pensar.infer.generation import Defaults, Generation
from pensar.infer.request import MAX_STOP_LENGTH, MAX_STOPS, MAX_TOP_LOGPROBS, Grammar
from pensar.serve.failure import invalid, overlong
from pensar.serve.wire import ChatRequest, CompletionRequest, SamplingFields, SentMessage, StructuredOutputs
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
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        raise invalid(
            f'tool_choice {choice!r} must be "auto", "none", "required" or a function.', "tool_choice"
        )
    if choice not in (None, "auto", "none") and not request.tools:
        raise invalid("tool_choice asks for a call, but the request has no tools; add them.", "tool_choice")
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
    off = request.thinking is False
    shared = SamplingParams(
        max_tokens=room,
        stop_ids=generation.end_ids,
        thinking_budget=None if off else request.budget,
        adaptive_budget=0.0 if off else request.adaptive_budget or 0.0,
        min_thinking=0 if off else request.min_thinking or 0,
        logprobs=bool(request.logprobs),
        top_logprobs=request.top_logprobs or 0,
        grammar=_tool_grammar(request) or _answer_grammar(request),
    )
    return _params(request, generation.defaults(mode), shared, request.n or 1)


def completion_params(
    request: CompletionRequest, num_prompt_tokens: int, context: int, generation: Generation
) -> list[SamplingParams]:
    """The same for /v1/completions, where the text is continued as it is; `best_of` sets if there are to be more.

    The first alone scores the prompt, where that is asked for.
    """
    _check_common(request)
    room = _room(num_prompt_tokens, request.max_tokens or COMPLETION_MAX_TOKENS, context)
    grammar = _structured(request.structured_outputs)
    count = request.best_of or request.n or 1
    logprobs = request.logprobs is not None or count > (request.n or 1)
    shared = SamplingParams(
        max_tokens=room,
        stop_ids=generation.end_ids,
        logprobs=logprobs,
        top_logprobs=request.logprobs or 0,
        grammar=grammar,
    )
    first, *others = _params(request, RAW, shared, count)
    scored = bool(request.echo) and request.logprobs is not None
    return [msgspec.structs.replace(first, prompt_logprobs=scored), *others]


def requests_of(
    name: str, asked: SamplingFields, adapter: str, sequences: Sequence[tuple[Sequence[int], SamplingParams]]
) -> list[Request]:
    """What the engine gets of the request `name`: a sequence for each prompt and its parameters."""
    return [
        Request(
            id=f"{name}-{index}",
            tokens=tokens,
            params=params,
            adapter=adapter,
            user=asked.safety_identifier or asked.user or "",
            priority=asked.priority or 0,
            timeout_seconds=asked.timeout,
            salt=asked.cache_salt or "",
        )
        for index, (tokens, params) in enumerate(sequences)
    ]


def _answer_grammar(request: ChatRequest) -> Grammar | None:
    """What the answer has to match."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return _structured(request.structured_outputs)
    if wanted.type == "json_object":
        return Grammar(kind="json_object")
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise invalid(
            "response_format of type json_schema has no json_schema.schema; send the schema, or type json_object for "
            "any object.",
            "response_format.json_schema",
        )
    return Grammar(kind="json_schema", text=_json(wanted.json_schema.schema))


def _structured(wanted: StructuredOutputs | None) -> Grammar | None:
    if wanted is None:
        return None
    given = {
        "json_schema": None if wanted.json is None else _json(wanted.json),
        "regex": wanted.regex,
        "choice": None if wanted.choice is None else _json(wanted.choice),
        "ebnf": wanted.grammar,
    }
    kinds = [kind for kind, text in given.items() if text is not None]
    if len(kinds) != 1:
        raise invalid(
            f"structured_outputs has {len(kinds)} of json, regex, choice and grammar; send one.",
            "structured_outputs",
        )
    return msgspec.convert({"kind": kinds[0], "text": given[kinds[0]]}, Grammar)


def _tool_grammar(request: ChatRequest) -> Grammar | None:
    """How calls have to look, where the request insists: by its choice, or by a function that is strict."""
    tools, choice = request.tools or (), request.tool_choice
    strict = any(tool.function.strict for tool in tools)
    if not tools or choice == "none" or (choice in (None, "auto") and not strict):
        return None
    if _answer_grammar(request) is not None:
        raise invalid(
            "the request has a format for its answer and insists on tool calls; an answer cannot be both: leave out "
            "one of them.",
            "response_format",
        )
    content = {
        "tools": msgspec.to_builtins(list(tools)),
        "tool_choice": choice or "auto",
        "parallel_tool_calls": request.parallel_tool_calls is not False,
    }
    return Grammar(kind="tools", text=_json(content))


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _params(
    request: SamplingFields, defaults: Defaults, shared: SamplingParams, count: int
) -> list[SamplingParams]:
    """`shared` once per sequence, with how to draw filled in; only the seed differs."""
    seed = request.seed if request.seed is not None else secrets.randbits(62)
    top_k = defaults.top_k if request.top_k is None else max(0, request.top_k)
    bias = tuple((int(token), bias) for token, bias in (request.logit_bias or {}).items())
    return [
        msgspec.structs.replace(
            shared,
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_p=defaults.top_p if request.top_p is None else request.top_p,
            top_k=top_k,
            min_p=defaults.min_p if request.min_p is None else request.min_p,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
            logit_bias=bias,
            min_tokens=request.min_tokens or 0,
            ignore_eos=bool(request.ignore_eos),
            # What the model's directory calls an end is one of its own ends, which ignore_eos is about.
            stop_ids=(*(() if request.ignore_eos else shared.stop_ids), *(request.stop_token_ids or ())),
            bad_ids=tuple(request.bad_token_ids or ()),
            seed=seed_of("choice", seed, index),
        )
        for index in range(count)
    ]


def _room(num_prompt_tokens: int, wanted: int | None, context: int) -> int:
    if num_prompt_tokens + (wanted or 1) > context:
        raise overlong(num_prompt_tokens, wanted or 0, context)
    return wanted or context - num_prompt_tokens


def _check_common(request: SamplingFields) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(request, name) or 0
        if not -2 <= value <= 2:
            raise invalid(f"{name} {value} must be at least -2 and at most 2.", name)
    penalty = request.repetition_penalty
    if penalty is not None and not 0.01 <= penalty <= 100:
        raise invalid(
            f"repetition_penalty {penalty} must be at least 0.01 and at most 100.", "repetition_penalty"
        )
    for token, bias in (request.logit_bias or {}).items():
        if not token.isascii() or not token.isdigit() or not -100 <= bias <= 100:
            raise invalid(
                f"logit_bias has {token!r}: {bias}; its keys are token ids, its values -100 to 100.",
                "logit_bias",
            )
    if len(request.stops) > MAX_STOPS:
        raise invalid(f"stop has {len(request.stops)} strings; at most {MAX_STOPS} are allowed.", "stop")
    if "" in request.stops:
        raise invalid("stop holds an empty string, which every text contains; drop it.", "stop")
    longest = max(map(len, request.stops), default=0)
    if longest > MAX_STOP_LENGTH:
        raise invalid(
            f"stop has a string of {longest} characters; at most {MAX_STOP_LENGTH} are allowed.", "stop"
        )


def _check_chat(request: ChatRequest) -> None:
    if request.budget is not None and request.budget < 0:
        raise invalid(
            f"thinking_budget {request.budget} is negative; use 0 to close the thinking at once, or leave it "
            "out for no limit.",
            "thinking_budget",
        )
    if request.reasoning_effort is not None and request.reasoning_effort not in EFFORTS:
        allowed = ", ".join(EFFORTS)
        raise invalid(
            f"reasoning_effort {request.reasoning_effort!r} is not one of {allowed}.", "reasoning_effort"
        )
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
        raise invalid(
            f"top_logprobs {request.top_logprobs} must be at least 0 and at most {MAX_TOP_LOGPROBS}.",
            "top_logprobs",
        )
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs; send logprobs true as well.", "top_logprobs")


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
