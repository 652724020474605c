"""The wire: chat completions, completions and models as OpenAI clients send and read them.

Unknown request fields are tolerated, as clients expect; a known field with a bad value is refused with its path,
its value and its limit. The thinking fields follow Qwen's own API (`enable_thinking`, `thinking_budget`).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from pensar.serve.failure import invalid

MAX_CHOICES = 16
MAX_BEST_OF = 20

MAX_PRIORITY = 2**31
Name = Annotated[str, msgspec.Meta(max_length=256)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
FinishReason = Literal["stop", "length", "tool_calls"]

# ---------------------------------------------------------------- requests


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str = "{}"
    """A JSON object, encoded as text."""


class SentToolCall(msgspec.Struct, kw_only=True):
    """A tool call that the model made in an earlier turn."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class SentMessage(msgspec.Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another server's spelling of `reasoning_content`; read, never written."""
    tool_calls: list[SentToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class FunctionSchema(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    function: FunctionSchema


class TemplateOptions(msgspec.Struct, kw_only=True):
    enable_thinking: bool | None = None


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool = False


class JsonSchema(msgspec.Struct, kw_only=True):
    name: str = ""
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """What the answer has to match, one of these, in vLLM's spelling."""

    json: Any = None
    """A JSON schema."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """Rules in Lark's or GBNF's notation."""


class SamplingFields(msgspec.Struct, kw_only=True):
    """What chat completions and completions share."""

    model: str | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    """0 and -1 keep the whole vocabulary."""
    min_p: Fraction | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """By token id."""
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], msgspec.Meta(max_length=64)] | None = None
    """End the reply as its own ends do."""
    bad_token_ids: list[int] | None = None
    """Tokens that are never drawn."""
    user: Name | None = None
    safety_identifier: Name | None = None
    """OpenAI's newer word for `user`, and wins over it: for whom the request is, in fairness and in the records."""
    priority: Annotated[int, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """Lower numbers go first."""
    timeout: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Seconds after which the reply ends as it is, with finish_reason "length"."""
    cache_salt: Annotated[Name, msgspec.Meta(min_length=1)] | None = None
    """Only requests with equal salts share cached prompts."""
    structured_outputs: StructuredOutputs | None = None
    use_beam_search: bool | None = None
    """The `n` likeliest replies as a whole in place of draws."""
    length_penalty: Annotated[float, msgspec.Meta(ge=-10, le=10)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    """Both are about beam search, see pensar.infer.beam."""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(SamplingFields, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[SentMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    """Wins over `max_tokens`; both count thinking and answer together."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    """Most tokens of thinking; 0 closes it at once, None sets no limit."""
    thinking_token_budget: int | None = None
    """vLLM's word for `thinking_budget`."""
    min_thinking: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Tokens of thinking before which it is not closed."""
    adaptive_budget: Fraction | None = None
    """A budget that suffices for this share of questions like this one, where the model has learned it."""
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: str | None = None

    @property
    def budget(self) -> int | None:
        """Most tokens of thinking, under either name."""
        return self.thinking_token_budget if self.thinking_budget is None else self.thinking_budget

    @property
    def thinking(self) -> bool | None:
        """The explicit mode, or None where the model and its soft switches decide."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        return False if self.reasoning_effort == "none" else None


class CompletionRequest(SamplingFields, kw_only=True):
    """Body of POST /v1/completions; `prompt` is text, token ids, or a list of either."""

    prompt: Any
    logprobs: int | None = None
    """Tells each token's log-probability, and those of so many of the likeliest; with `echo` the prompt's as well."""
    echo: bool | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1, le=MAX_BEST_OF)] | None = None
    """So many are drawn, and the `n` with the highest log-probability per token come back."""
    suffix: str | None = None


# ---------------------------------------------------------------- replies


class PromptDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int = 0


class CompletionDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


def usage(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int, cached_tokens: int) -> Usage:
    """Counts of tokens; the completion's include its reasoning and the end of the turn."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached_tokens),
        completion_tokens_details=CompletionDetails(reasoning_tokens=reasoning_tokens),
    )


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list["TopLogprob"] = []


class Logprobs(msgspec.Struct, kw_only=True):
    """One entry per generated token, those of the thinking and of the tags included."""

    content: list[TokenLogprob]


class CallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A piece of a tool call: the first one names it, later ones extend the arguments."""

    index: int | msgspec.UnsetType = msgspec.UNSET
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET
    function: dict[str, str]


class ReplyMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType | None = msgspec.UNSET
    tool_calls: list[CallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ReplyMessage
    finish_reason: FinishReason
    logprobs: Logprobs | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ReplyMessage
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | None = None


class TextLogprobs(msgspec.Struct, kw_only=True):
    """One entry per token, those of an echoed prompt included; nothing comes before its first, which has None."""

    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int]
    top_logprobs: list[dict[str, float] | None] | None = None
    """The likeliest tokens at each place, and the one that stands there; None where none were asked for."""


class TextChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None


class TextCompletion(msgspec.Struct, kw_only=True):
    """A whole completion, or one chunk of a streamed one: they look alike."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | None = None


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    created: int
    max_model_len: int
    """Context window in tokens."""
    object: Literal["model"] = "model"
    owned_by: str = "pensar"
    root: str = ""
    """What it is: the model, or the adapter's folder by its last name."""
    parent: str | None = None
    """Of an adapter, the model that it changes."""


class ModelList(msgspec.Struct, kw_only=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


# ---------------------------------------------------------------- reading a request

Body = TypeVar("Body", bound=msgspec.Struct)

_AT = re.compile(r" - at `\$(?P<path>.*)`$")
_STEP = re.compile(r"\.(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]")


def read_request(body: bytes, kind: type[Body]) -> Body:
    """Decodes and checks a body; raises ApiError (400) that names the field, its value and what is allowed."""
    try:
        tree = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise _explained(error, tree) from error


def _explained(error: msgspec.ValidationError, tree: Any) -> Exception:
    """Adds the offending value, which msgspec leaves out, to its message."""
    text = str(error)
    found = _AT.search(text)
    if found is None:
        return invalid(f"{text}.", param=_missing_field(text))
    value, path = tree, found["path"]
    for step in _STEP.finditer(path):
        if step["key"] is not None and isinstance(value, Mapping):
            value = value.get(step["key"])
        elif step["index"] is not None and isinstance(value, list):
            value = value[int(step["index"])]
    shown = msgspec.json.encode(value).decode()
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    param = path.lstrip(".")
    return invalid(f"{param}: {text[: found.start()]}; the request has {shown}.", param=param or None)


def _missing_field(text: str) -> str | None:
    named = re.search(r"missing required field `(\w+)`", text)
    return named[1] if named else None
