"""Reading a reply: reasoning, answer and tool calls, whole or while it streams in.

The reader sees text, so tags may be split over pieces; its output is the same for every way of cutting the
text.
"""

import json
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from pensar.text.conversation import Message, ToolCall

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"


class Delta(msgspec.Struct, frozen=True):
    """A piece of a reply: some text of its reasoning or content, or one complete tool call."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    tool_call: ToolCall | None = None


class ReplyParser:
    """Reads a reply piece by piece.

    `thinking` says that the prompt ended inside an open thinking block. Reasoning is all that stands in a
    block at the very beginning, also when it never ends; the line feeds around it belong to the format. Later
    tags of thinking are ordinary text. A tool call is held back until it is complete; one that is no JSON
    object with a name and arguments stays in the content as it was written. The text around tool calls is one
    content, joined by a line feed.
    """

    def __init__(self, *, thinking: bool = False) -> None:
        self._state: Callable[[bool], bool] = self._reasoning if thinking else self._beginning
        self._text = ""
        self._deltas: list[Delta] = []
        self._reasoning_parts: list[str] = []
        self._content_parts: list[str] = []
        self._calls: list[ToolCall] = []
        self._skip_feeds = True
        self._after_call = False
        self._closes_seen = 0
        self._joiner = ""

    def feed(self, piece: str) -> list[Delta]:
        """What has become certain with `piece`."""
        self._text += piece
        return self._run(final=False)

    def close(self) -> list[Delta]:
        """What was held back at the end of the reply; the parser takes no more afterwards."""
        return self._run(final=True)

    def message(self) -> Message:
        """The reply so far as a message; complete after `close`."""
        content = "".join(self._content_parts)
        reasoning = "".join(self._reasoning_parts)
        # An empty string, unlike None, keeps the chat format from looking for reasoning inside the content.
        absent = "" if THINK_END in content else None
        return Message(
            role="assistant",
            content=content,
            reasoning_content=reasoning or absent,
            tool_calls=tuple(self._calls),
        )

    def _run(self, final: bool) -> list[Delta]:
        while self._state(final):
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    # Each state consumes what it can from the text and returns whether another state has to look at the rest.

    def _beginning(self, final: bool) -> bool:
        start = self._text.lstrip()
        if not start.startswith(THINK):
            if THINK.startswith(start) and not final:
                return False
            self._state = self._content
            return True
        self._text = start[len(THINK) :]
        self._state = self._reasoning
        return True

    def _reasoning(self, final: bool) -> bool:
        end = self._text.find(THINK_END)
        if end >= 0:
            self._say("reasoning", self._text[:end].rstrip("\n"))
            self._text = self._text[end + len(THINK_END) :]
            self._skip_feeds = True
            self._state = self._content
            return True
        kept = 0 if final else _held(self._text, THINK_END)
        sure = self._text[: len(self._text) - kept].rstrip("\n")
        self._say("reasoning", sure)
        self._text = "" if final else self._text[len(sure) :]
        return False

    def _content(self, final: bool) -> bool:
        start = self._text.find(CALL)
        if start >= 0:
            # The line feed before a call joins it to the content and belongs to neither.
            before = self._text[:start]
            self._joiner = "\n" if before.endswith("\n") else ""
            self._say("content", before.removesuffix("\n"))
            self._text = self._text[start + len(CALL) :]
            self._closes_seen = 0
            self._state = self._call
            return True
        kept = 0 if final else max(_held(self._text, CALL), _held(self._text, "\n" + CALL))
        self._say("content", self._text[: len(self._text) - kept])
        self._text = self._text[len(self._text) - kept :]
        return False

    def _call(self, final: bool) -> bool:
        while (end := self._text.find(CALL_END, self._closes_seen)) >= 0:
            call, cut = _read_call(self._text[:end])
            if call is not None:
                self._calls.append(call)
                self._deltas.append(Delta("tool_call", tool_call=call))
                self._text = self._text[end + len(CALL_END) :]
                self._after_call = self._skip_feeds = True
                self._state = self._content
                return True
            if not cut:
                return self._keep_as_text()
            self._closes_seen = end + 1
        return self._keep_as_text() if final else False

    def _keep_as_text(self) -> bool:
        """A call that cannot be read goes into the content, up to its first end; the rest is looked at
        again."""
        end = self._text.find(CALL_END)
        stop = len(self._text) if end < 0 else end + len(CALL_END)
        self._say("content", self._joiner + CALL + self._text[:stop])
        self._text = self._text[stop:]
        self._state = self._content
        return True

    def _say(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if self._skip_feeds:
            text = text.lstrip("\n")
        if not text:
            return
        self._skip_feeds = False
        if kind == "content" and self._after_call:
            text = "\n" + text if self._content_parts else text
            self._after_call = False
        (self._reasoning_parts if kind == "reasoning" else self._content_parts).append(text)
        self._deltas.append(Delta(kind, text))


def parse_reply(text: str, *, thinking: bool = False) -> Message:
    """The whole reply as a message, read like `ReplyParser` reads it.

    `text` is decoded with `skip_special=True` or without the tokens that end the turn; `thinking` says that
    the prompt ended inside an open thinking block.
    """
    parser = ReplyParser(thinking=thinking)
    parser.feed(text)
    parser.close()
    return parser.message()


def _held(text: str, tag: str) -> int:
    """Length of the longest end of `text` that may grow into `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def _read_call(text: str) -> tuple[ToolCall | None, bool]:
    """The tool call, or None with whether the text may only be cut inside a string that spells the closing
    tag."""
    try:
        value: Any = json.loads(text, parse_constant=_refuse)
        if "\\u" in text:  # an escape may spell half a character, which no wire format carries
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return None, error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):  # a number of too many digits, a nest of too many brackets
        return None, False
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None, False
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None, False
    if not isinstance(arguments, dict):
        return None, False
    return ToolCall(name=value["name"], arguments=arguments), False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
