"""LLM: a model directory that one can talk to from Python."""

import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import msgspec
import torch

from pensar.base.errors import ConfigError, ModelError
from pensar.base.files import seed_of
from pensar.infer.adaptive import AdaptiveBudget
from pensar.infer.budget import THINKING, Thinking
from pensar.infer.cuda.runner import CudaRunner
from pensar.infer.engine import Completion, Engine, Request, SamplingParams
from pensar.infer.generation import read_generation
from pensar.infer.request import FinishReason, Grammar, Ints, checked_tokens
from pensar.infer.runners import Cache, Weights, runner_for
from pensar.infer.score import score
from pensar.infer.speculate import speculation
from pensar.infer.spill import SpillConfig
from pensar.infer.step import Runner
from pensar.model.weights import load_model
from pensar.text.chat import Delta, ReplyParser, encode_prompt, mode_of
from pensar.text.conversation import Conversation, Message, ToolCall
from pensar.text.tokenizer import THINK, StreamDecoder, Tokenizer

Messages: TypeAlias = Conversation | Sequence[Message | Mapping[str, Any]]
"""A conversation, or its messages as objects or as OpenAI's dictionaries."""


class ChatOptions(TypedDict, total=False):
    """What `chat`, `chat_batch` and `stream` understand."""

    tools: Sequence[Mapping[str, Any]]
    """Function schemas in OpenAI's shape."""
    thinking: bool | None
    """True and None let the model (and `/think`, `/no_think` in the messages) decide; False closes the block."""
    thinking_budget: int | None
    """Reasoning tokens after which the thinking is closed; None for no limit."""
    max_tokens: int | None
    """Limit for the reply; None for what is left of the context."""
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    """None takes the model's default for the mode."""
    seed: int
    """Equal seeds give equal replies; 0 unless said otherwise."""
    stop_ids: Sequence[int]
    stop: Sequence[str]
    """Texts that end the answer and are not part of it."""
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    grammar: Grammar | None
    """What the answer has to match; the thinking before it is free."""
    adaptive_budget: float
    """A thinking budget that suffices for this share of questions like this one, where the model has learned it."""
    adapter: str
    """A LoRA adapter loaded by `engine.load_adapter`."""


PLAIN = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "grammar",
    "adaptive_budget",
)
"""Options that the engine knows by the same names."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one exchange."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    """The part of completion_tokens inside the thinking block."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer with its reasoning apart."""

    content: str
    reasoning_content: str | None
    """None where there was no reasoning."""
    tool_calls: tuple[ToolCall, ...]
    usage: Usage
    finish_reason: FinishReason | str
    """stop, length, or tool_calls."""


class LLM:
    """A Qwen3-style Hugging Face directory with its tokenizer and an engine; not thread-safe.

    `dtype` None means float32 on a CPU, where 16-bit products are slower, and the file's own type elsewhere. `weights`
    in "int8" or "int4" answers faster on a CPU, and rounds; a `cache` in "bfloat16" or "int8" holds longer texts;
    `threads` None are as many as are fastest, and `pin` keeps each on its core; `adapters` are LoRA folders by the
    names that requests use. Tokens are guessed ahead, which changes no reply, by `lookup` in the text, by a smaller
    model (`draft`) or by a trained head (`draft_head`). The cache's old pages go to a `spill`. A `runner` has the
    folder's weights already, for instance on several ranks.
    Raises ModelError for a folder that cannot be opened and for a tokenizer with more tokens than the model.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        slots: int = 64,
        max_tokens_per_slot: int | None = None,
        weights: Weights = "as_is",
        cache: Cache = "as_is",
        threads: int | None = None,
        pin: bool = False,
        adapters: Mapping[str, Path | str] | None = None,
        lookup: bool = False,
        draft: Path | str | None = None,
        draft_head: Path | str | None = None,
        spill: SpillConfig | None = None,
        runner: Runner | None = None,
    ) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise ModelError(
                f"{folder} is not a folder; give a model directory with config.json and model.safetensors"
            )
        if dtype is None and torch.device(device).type == "cpu":
            dtype = torch.float32
        if runner is None:
            model = load_model(folder, device=device, dtype=dtype)
            runner = runner_for(model, weights, cache=cache, threads=threads, pin=pin)
            if isinstance(runner, CudaRunner):
                runner.warm_up(slots)  # before the cache takes what memory is free
        elif weights != "as_is" or cache != "as_is":
            raise ConfigError(
                f"weights={weights!r} and cache={cache!r} with a runner, which has its own; give one of them"
            )
        self.model = runner.model
        self.tokenizer = Tokenizer.load(folder)
        self.engine = Engine(
            runner,
            self.tokenizer,
            slots=slots,
            max_tokens_per_slot=max_tokens_per_slot,
            spill=spill,
            speculation=speculation(
                self.model,
                lookup=lookup,
                head=None if draft_head is None else Path(draft_head),
                draft=None if draft is None else Path(draft),
                slots=slots,
            ),
        )
        for name, path in (adapters or {}).items():
            self.engine.load_adapter(name, Path(path))
        self.engine.adaptive = AdaptiveBudget.load(folder, self.model.config.hidden_size)
        self._thinking = Thinking(self.tokenizer) if THINK in self.tokenizer.control_tokens else None
        self.generation = read_generation(folder)
        """What the model's directory says of sampling where the caller says nothing."""
        self._num_requests = 0

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Reply:
        """The assistant's next message. Raises ModelError for what does not fit the context."""
        return self.chat_batch([messages], **options)[0]

    def chat_batch(self, conversations: Sequence[Messages], **options: Unpack[ChatOptions]) -> list[Reply]:
        """`chat` of many conversations at once; the order of replies is that of the conversations."""
        requests = [self._request(messages, options, index) for index, messages in enumerate(conversations)]
        completions = self._run(requests)
        return [self._reply(*pair) for pair in zip(requests, completions, strict=True)]

    def stream(self, messages: Messages, **options: Unpack[ChatOptions]) -> Generator[Delta, None, Reply]:
        """The same reply as `chat` in pieces, reasoning and content apart; the generator returns the Reply.

        Closing the generator ends the request.
        """
        request = self._request(messages, options, 0)
        parser, decoder = self._parser(request), StreamDecoder(self.tokenizer, skip_special=True)
        tokens: list[int] = []
        said = 0
        self.engine.submit(request)
        try:
            while True:
                piece = next((piece for piece in self.engine.step() if piece.id == request.id), None)
                if piece is None:  # more prompts were waiting than one step computes
                    continue
                if piece.error is not None:
                    raise ModelError(piece.error)
                tokens += piece.tokens
                ended = piece.finish_reason == "stop" and piece.stopped_at is None
                text = decoder.feed(piece.tokens[:-1] if ended else piece.tokens)
                if piece.stopped_at is not None:
                    text = (text + decoder.close())[: piece.stopped_at - said]
                said += len(text)
                yield from parser.feed(text)
                if piece.finish_reason is not None:
                    break
        finally:
            self.engine.abort(request.id)
        if piece.stopped_at is None:
            yield from parser.feed(decoder.close())
        yield from parser.close()
        usage = _usage(request, len(tokens), piece.reasoning_tokens)
        return _reply_of(parser.message(), usage, piece.finish_reason)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        thinking_budget: int | None = None,
        logprobs: bool = False,
    ) -> list[Completion]:
        """Continues token sequences as they are, without chat format."""
        requests = []
        for index, tokens in enumerate(prompts):
            params = SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                seed=seed_of("reply", seed, index),
                stop_ids=(*self.generation.end_ids, *stop_ids),
                thinking_budget=thinking_budget,
                logprobs=logprobs,
            )
            requests.append(Request(self._next_id(), tokens, params))
        return self._run(requests)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Per sequence the log-probability of every token given those before it; 0 for the first."""
        config = self.model.config
        arrays: list[Ints] = []
        for index, tokens in enumerate(sequences):
            arrays.append(checked_tokens(f"sequence {index}", tokens, config.vocab_size))
            if len(tokens) > config.max_positions:
                raise ModelError(
                    f"sequence {index} has {len(tokens):,} tokens, the model takes {config.max_positions:,}; split it"
                )
        return score(self.model, arrays)

    def _request(self, messages: Messages, options: ChatOptions, index: int) -> Request:
        unknown = sorted(options.keys() - ChatOptions.__annotations__.keys())
        if unknown:
            raise ConfigError(
                f"unknown option {unknown[0]!r}; there are {', '.join(ChatOptions.__annotations__)}"
            )
        conversation = _conversation(messages, options.get("tools"))
        thinking = options.get("thinking")
        tokens = encode_prompt(self.tokenizer, conversation, thinking=thinking)
        mode = thinking if thinking is not None else mode_of(conversation)
        defaults = self.generation.defaults(mode)

        def chosen(name: str) -> Any:
            value = options.get(name)
            return getattr(defaults, name) if value is None else value

        max_tokens = options.get("max_tokens")
        if max_tokens is None:
            max_tokens = self.engine.max_positions - len(tokens)
            if max_tokens < 1:
                raise ModelError(
                    f"the conversation has {len(tokens):,} tokens and the context {self.engine.max_positions:,}; "
                    "shorten it, so that there is room for a reply"
                )
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=chosen("temperature"),
            top_p=chosen("top_p"),
            top_k=chosen("top_k"),
            min_p=chosen("min_p"),
            seed=seed_of("reply", options.get("seed", 0), index),
            stop_ids=(*self.generation.end_ids, *options.get("stop_ids", ())),
            thinking_budget=None if thinking is False else options.get("thinking_budget"),
            logit_bias=tuple(options.get("logit_bias", {}).items()),
            stop=tuple(options.get("stop", ())),
            **{name: value for name, value in options.items() if name in PLAIN},  # type: ignore[arg-type]
        )
        return Request(self._next_id(), tokens, params, adapter=options.get("adapter", ""))

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"llm-{self._num_requests}"

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        completions = self.engine.run(requests)
        for completion in completions:
            if completion.error is not None:
                raise ModelError(completion.error)
        return completions

    def _parser(self, request: Request) -> ReplyParser:
        prompt = checked_tokens("the prompt", request.tokens, self.model.config.vocab_size)
        inside = self._thinking is not None and self._thinking.phase_of(prompt) == THINKING
        return ReplyParser(thinking=inside)

    def _reply(self, request: Request, completion: Completion) -> Reply:
        ended = completion.finish_reason == "stop" and completion.stopped_at is None
        text = self.tokenizer.decode(
            completion.tokens[:-1] if ended else completion.tokens, skip_special=True
        )[: completion.stopped_at]
        parser = self._parser(request)
        parser.feed(text)
        parser.close()
        usage = _usage(request, len(completion.tokens), completion.num_reasoning_tokens)
        return _reply_of(parser.message(), usage, completion.finish_reason)


def _usage(request: Request, num_tokens: int, num_reasoning_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=len(request.tokens), completion_tokens=num_tokens, reasoning_tokens=num_reasoning_tokens
    )


def _reply_of(message: Message, usage: Usage, finish_reason: FinishReason) -> Reply:
    return Reply(
        content=message.content,
        reasoning_content=message.reasoning_content or None,
        tool_calls=message.tool_calls,
        usage=usage,
        finish_reason="tool_calls" if message.tool_calls and finish_reason == "stop" else finish_reason,
    )


def _conversation(messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> Conversation:
    if isinstance(messages, Conversation):
        if tools is None:
            return messages
        return msgspec.structs.replace(messages, tools=tuple(dict(tool) for tool in tools))
    said = tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))
    if not said:
        raise ConfigError("messages is empty; give at least the user's question")
    return Conversation(messages=said, tools=tuple(dict(tool) for tool in tools or ()))


def _message(message: Message | Mapping[str, Any], where: str) -> Message:
    """A message from OpenAI's dictionary, whose tool calls are nested and carry their arguments as JSON text."""
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise ConfigError(
            f'{where} is {message!r}; give messages such as {{"role": "user", "content": "Hello"}}'
        )
    fields = {name: value for name, value in message.items() if value is not None}
    if isinstance(parts := fields.get("content"), list):
        fields["content"] = "".join(part.get("text", "") for part in parts)
    calls = []
    for call in fields.get("tool_calls", ()):
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError as error:
            raise ConfigError(
                f"{where}: the arguments of a tool call are not JSON ({error}): {arguments!r}"
            ) from error
        calls.append({"name": function.get("name"), "arguments": parsed, "id": call.get("id") or ""})
    fields["tool_calls"] = calls
    try:
        return msgspec.convert(fields, Message)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where} is not a chat message: {error}") from error
