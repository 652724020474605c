"""Conversations through the chat template that a downloaded checkpoint brings, with control tokens kept out
of reach.

A Jinja template mixes its own control tokens and other people's words in one string. To tell them apart
afterwards, every control token's name inside the words is broken by a marker character before rendering; what
then still spells a control token was written by the template. The marker is taken out again from the text
between them.
"""

import re
from typing import Any

import msgspec
import numpy as np

from pensar.base.errors import DataError
from pensar.text.conversation import Conversation, Message, ToolCall
from pensar.text.sample import Sample
from pensar.text.template import CHAT_TEMPLATE, render_template
from pensar.text.tokenizer import THINK, THINK_END, Tokenizer

NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Code points that Unicode keeps free for uses like the marker (section 23.7)."""


def has_foreign_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer came with a chat template that is not ours."""
    return tokenizer.chat_template not in (None, CHAT_TEMPLATE)


def encode_foreign(
    tokenizer: Tokenizer, conversation: Conversation, *, prompt: bool, thinking: bool | None = None
) -> list[int]:
    """Tokens of the conversation as the tokenizer's own template writes it, ready for a reply when `prompt`.

    Thinking tags inside the content of an assistant's message stay tags, as templates look for them there.
    """
    if not conversation.messages:
        raise DataError("the conversation has no messages; give at least one")
    numbers = tokenizer.control_tokens
    control = re.compile("(" + "|".join(re.escape(name) for name in numbers) + ")")
    marker = _unused_character(conversation)
    guarded = _guard(conversation, control, marker)
    text = render_template(
        tokenizer.chat_template or CHAT_TEMPLATE, guarded, prompt=prompt, thinking=thinking
    )
    tokens: list[int] = []
    for part in control.split(text):
        if part in numbers:
            tokens.append(numbers[part])
        elif part:
            tokens.extend(tokenizer.encode(part.replace(marker, "")))
    return tokens


def foreign_sample(tokenizer: Tokenizer, conversation: Conversation, thinking: bool | None) -> Sample:
    """The conversation with `ce` 1 on what its last message adds to the prompt, up to the end of the turn."""
    before = msgspec.structs.replace(conversation, messages=conversation.messages[:-1])
    prompt = encode_foreign(tokenizer, before, prompt=True, thinking=thinking)
    whole = encode_foreign(tokenizer, conversation, prompt=False, thinking=thinking)
    if whole[: len(prompt)] != prompt:
        raise DataError(
            "the model's chat template does not continue its own prompt when it renders the reply, so the "
            "reply cannot be told from the prompt; train with tokenizer.with_chat_template(CHAT_TEMPLATE)"
        )
    tokens = np.asarray(whole, np.int32)
    ce = np.ones(len(whole), np.float32)
    ce[: len(prompt)] = 0.0
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    if len(ends) and ends[-1] >= len(prompt):
        ce[ends[-1] + 1 :] = 0.0
    return Sample(tokens=tokens, ce=ce)


def _unused_character(conversation: Conversation) -> str:
    spelled = msgspec.json.encode(conversation).decode()
    for character in NONCHARACTERS:
        if character not in spelled:
            return character
    raise DataError("the conversation holds every Unicode noncharacter U+FDD0 to U+FDEF; remove one of them")


def _guard(conversation: Conversation, control: re.Pattern[str], marker: str) -> Conversation:
    def broken(match: re.Match[str]) -> str:
        return match[0][0] + marker + match[0][1:]

    def broken_unless_thinking(match: re.Match[str]) -> str:
        return match[0] if match[0] in (THINK, THINK_END) else broken(match)

    def guard(value: Any) -> Any:
        if isinstance(value, str):
            return control.sub(broken, value)
        if isinstance(value, dict):
            return {guard(key): guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [guard(item) for item in value]
        return value

    def guarded(message: Message) -> Message:
        tags = broken_unless_thinking if message.role == "assistant" else broken
        return msgspec.structs.replace(
            message,
            content=control.sub(tags, message.content),
            reasoning_content=guard(message.reasoning_content),
            name=guard(message.name),
            tool_calls=tuple(
                ToolCall(name=guard(call.name), arguments=guard(call.arguments), id=call.id)
                for call in message.tool_calls
            ),
        )

    return Conversation(
        messages=tuple(guarded(message) for message in conversation.messages),
        tools=tuple(guard(conversation.tools)),
    )
