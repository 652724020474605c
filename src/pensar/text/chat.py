"""The chat format: conversations to tokens for prompts and for training, in Qwen3's layout.

A conversation is written as pieces, and only pieces that this file writes can be control tokens; whatever a
user, a tool or an assistant said is encoded as plain characters, even where it spells `<|im_end|>`. The
reverse direction is in `pensar.text.reply`. A model directory that brings a chat template of its own is
rendered with that.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import msgspec
import numpy as np

from pensar.base.errors import DataError
from pensar.text.conversation import Conversation, Message
from pensar.text.foreign import encode_foreign, foreign_sample, has_foreign_template
from pensar.text.reply import Delta, ReplyParser, parse_reply
from pensar.text.sample import Sample
from pensar.text.template import TOOLS_AFTER, TOOLS_BEFORE
from pensar.text.tokenizer import CONTROL_TOKENS, TURN_END, Tokenizer

__all__ = [
    "EMPTY_THINKING",
    "STOP_SENTENCE",
    "Delta",
    "ReplyParser",
    "encode_prompt",
    "encode_stop_sentence",
    "encode_training",
    "mode_of",
    "parse_reply",
    "render",
    "split_turns",
]

EMPTY_THINKING = "<think>\n\n</think>\n\n"
STOP_SENTENCE = (
    "\n\nConsidering the limited time by the user, "
    "I have to give the solution based on the thinking directly now.\n</think>\n\n"
)
"""Put into a reply whose thinking has reached its budget (Qwen3 technical report, section 4.3)."""

# A flag stands apart from words and paths: "what is /think/pad" and "/thinking" hold none.
_FLAG = re.compile(r"(?<![A-Za-z0-9_/.\-])/(no_think|think)(?![A-Za-z0-9_/\-])")
_CONTROL = re.compile("(" + "|".join(re.escape(name) for name in CONTROL_TOKENS) + ")")


class _Piece(NamedTuple):
    text: str
    control: bool = False
    learned: bool = False
    """Whether the assistant is trained to write it."""


def encode_prompt(
    tokenizer: Tokenizer, conversation: Conversation, *, thinking: bool | None = None
) -> list[int]:
    """Tokens up to where the assistant's next reply begins.

    `thinking=False` appends the empty thinking block, so that the reply starts with the answer; True and None
    leave the choice to the model and to the flags in the conversation.
    """
    if has_foreign_template(tokenizer):
        return encode_foreign(tokenizer, conversation, prompt=True, thinking=thinking)
    return _encode(tokenizer, _prompt(conversation, thinking))[0]


def encode_training(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    thinking: bool | None = None,
    every_turn: bool = False,
) -> Sample:
    """The conversation as a sample whose `ce` is 1 on what the assistant has to write, `<|im_end|>` included.

    That is the last message, or with `every_turn` every message of the assistant. `thinking=False` says that
    the prompt will give the empty thinking block: it then has weight 0, and the message must have no
    reasoning. The tokens before the last message are those of `encode_prompt`. Earlier turns lose their
    reasoning as they do in use, so to teach thinking in them train on `split_turns` instead. Raises DataError
    when there is no such message.
    """
    messages = conversation.messages
    if not messages or messages[-1].role != "assistant":
        role = messages[-1].role if messages else "nobody"
        raise DataError(
            f"a training conversation must end with the assistant's message, not with {role}'s; add it"
        )
    if thinking is False and _spoken(messages[-1])[0]:
        raise DataError(
            "the last message has reasoning although thinking=False puts an empty thinking block before it; "
            "drop its reasoning_content or leave thinking unset"
        )
    if has_foreign_template(tokenizer):
        if every_turn:
            raise DataError(
                "every_turn needs our own chat template; train on split_turns(conversation) instead"
            )
        return foreign_sample(tokenizer, conversation, thinking)
    learned = {index for index, message in enumerate(messages) if message.role == "assistant"}
    if not every_turn:
        learned = {len(messages) - 1}
    tokens, weights = _encode(tokenizer, _pieces(conversation, learned, thinking))
    return Sample(tokens=np.asarray(tokens, np.int32), ce=np.asarray(weights, np.float32))


def encode_stop_sentence(tokenizer: Tokenizer) -> list[int]:
    """STOP_SENTENCE as tokens, its `</think>` being the control token."""
    return _encode(tokenizer, _protocol(STOP_SENTENCE))[0]


def render(conversation: Conversation, *, prompt: bool = False, thinking: bool | None = None) -> str:
    """The conversation as text, for people to read; encode with `encode_prompt`, which keeps control tokens
    apart."""
    pieces = _prompt(conversation, thinking) if prompt else _pieces(conversation, frozenset(), None)
    return "".join(piece.text for piece in pieces)


def split_turns(conversation: Conversation) -> list[Conversation]:
    """One conversation per message of the assistant, ending with it: each can be trained with its own
    reasoning."""
    return [
        msgspec.structs.replace(conversation, messages=conversation.messages[: index + 1])
        for index, message in enumerate(conversation.messages)
        if message.role == "assistant"
    ]


def mode_of(conversation: Conversation) -> bool | None:
    """True after `/think`, False after `/no_think`; the last flag of users and system wins, None without
    one."""
    for message in reversed(conversation.messages):
        if message.role in ("user", "system"):
            flags = _FLAG.findall(message.content)
            if flags:
                return bool(flags[-1] == "think")
    return None


def _prompt(conversation: Conversation, thinking: bool | None) -> Iterator[_Piece]:
    yield from _pieces(conversation, frozenset(), None)
    yield from _protocol("<|im_start|>assistant\n")
    if thinking is False:
        yield from _protocol(EMPTY_THINKING)


def _pieces(
    conversation: Conversation, learned: frozenset[int] | set[int], thinking: bool | None
) -> Iterator[_Piece]:
    messages = conversation.messages
    if not messages:
        raise DataError("the conversation has no messages; give at least one")
    yield from _system(conversation)
    question = _last_question(messages)
    last = len(messages) - 1
    for index, message in enumerate(messages):
        if message.role == "user" or (message.role == "system" and index > 0):
            yield from _turn(message.role, message.content)
        elif message.role == "tool":
            if index == 0 or messages[index - 1].role != "tool":
                yield from _protocol("<|im_start|>user")
            yield from _protocol("\n<tool_response>\n")
            yield _Piece(message.content)
            yield from _protocol("\n</tool_response>")
            if index == last or messages[index + 1].role != "tool":
                yield from _protocol("<|im_end|>\n")
        elif message.role == "assistant":
            yield from _protocol("<|im_start|>assistant\n")
            shown = index > question and (index == last or bool(_spoken(message)[0]))
            given = thinking is False and index == last
            yield from _assistant(message, shown, learned=index in learned, given=given)
            yield _Piece("\n")


def _system(conversation: Conversation) -> Iterator[_Piece]:
    first = conversation.messages[0]
    if not conversation.tools:
        if first.role == "system":
            yield from _turn("system", first.content)
        return
    yield from _protocol("<|im_start|>system\n")
    if first.role == "system":
        yield _Piece(first.content + "\n\n")
    yield from _protocol(TOOLS_BEFORE)
    for tool in conversation.tools:
        yield _Piece("\n" + _json(tool))
    yield from _protocol(TOOLS_AFTER + "<|im_end|>\n")


def _turn(role: str, content: str) -> Iterator[_Piece]:
    yield from _protocol(f"<|im_start|>{role}\n")
    yield _Piece(content)
    yield from _protocol("<|im_end|>\n")


def _assistant(message: Message, shown: bool, *, learned: bool, given: bool) -> Iterator[_Piece]:
    """The body of an assistant's turn with `<|im_end|>`; `given` thinking was in the prompt and is not
    learned."""
    thought, content = _spoken(message)
    if shown:
        marked = learned and not given
        yield from _protocol("<think>\n", marked)
        yield _Piece(thought.strip("\n"), learned=marked)
        yield from _protocol("\n</think>\n\n", marked)
    yield _Piece(content.lstrip("\n") if shown else content, learned=learned)
    for number, call in enumerate(message.tool_calls):
        if content or number > 0:
            yield _Piece("\n", learned=learned)
        yield from _protocol("<tool_call>", learned)
        # The name is not escaped: that is how Qwen3 was taught.
        yield _Piece(f'\n{{"name": "{call.name}", "arguments": {_json(call.arguments)}}}\n', learned=learned)
        yield from _protocol("</tool_call>", learned)
    yield from _protocol(TURN_END, learned)


def _spoken(message: Message) -> tuple[str, str]:
    """An assistant's reasoning and answer, also where the reasoning was left inside the content."""
    if message.reasoning_content is not None:
        return message.reasoning_content, message.content
    if "</think>" not in message.content:
        return "", message.content
    parts = message.content.split("</think>")
    return parts[0].rstrip("\n").split("<think>")[-1].lstrip("\n"), parts[-1].lstrip("\n")


def _last_question(messages: Sequence[Message]) -> int:
    """Index of the last message in which a person asks; a user message that carries a tool's result is
    none."""
    for index in range(len(messages) - 1, -1, -1):
        content = messages[index].content
        wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[index].role == "user" and not wrapped:
            return index
    return len(messages)


def _protocol(text: str, learned: bool = False) -> Iterator[_Piece]:
    """Text of the format itself, in which the names of control tokens mean those tokens."""
    for part in _CONTROL.split(text):
        if part:
            yield _Piece(part, part in CONTROL_TOKENS, learned)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _encode(tokenizer: Tokenizer, pieces: Iterable[_Piece]) -> tuple[list[int], list[float]]:
    """Ids and training weights; text is joined before encoding, as merges may cross pieces, but not where the
    part that is learned begins, so that a training sample starts with exactly the tokens of its prompt."""
    tokens: list[int] = []
    weights: list[float] = []
    for (control, learned), group in groupby(pieces, key=lambda piece: (piece.control, piece.learned)):
        if control:
            ids = [tokenizer.special(piece.text) for piece in group]
        else:
            ids = tokenizer.encode("".join([piece.text for piece in group]))
        tokens.extend(ids)
        weights.extend([float(learned)] * len(ids))
    return tokens, weights
