"""Reading replies: hand cases, and streaming equal to whole reading for any cut."""

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pensar.text.conversation import ToolCall
from pensar.text.reply import Delta, ReplyParser, parse_reply

ADD = ToolCall(name="add", arguments={"a": 1, "b": [2]})
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1\n</tool_call>'

CASES: dict[str, tuple[str, str | None, str, int]] = {
    # name: (text, reasoning, content, number of tool calls)
    "nothing": ("", None, "", 0),
    "answer": ("4.", None, "4.", 0),
    "thinking and answer": ("<think>\n2+2\nis 4\n</think>\n\n4.\n", "2+2\nis 4", "4.\n", 0),
    "empty thinking": ("<think>\n\n</think>\n\n4.", None, "4.", 0),
    "space before thinking": ("\n <think>hm</think>4", "hm", "4", 0),
    "unfinished thinking": ("<think>\nso we\n", "so we", "", 0),
    "unfinished tag": ("<think>\nso </thin", "so </thin", "", 0),
    "unfinished opening": ("<thi", None, "<thi", 0),
    "thinking later is text": ("a <think>b</think>", None, "a <think>b</think>", 0),
    "second thinking is text": ("<think>a</think>\n\nb</think>c", "a", "b</think>c", 0),
    "call": (CALL, None, "", 1),
    "thinking and call": (f"<think>\nadd\n</think>\n\n{CALL}", "add", "", 1),
    "words and calls": (f"I add.\n{CALL}\n{CALL}", None, "I add.", 2),
    "words around calls": (
        f"I add.\n\n{CALL}\nDone.\n{CALL}\n\nTruly.\n",
        None,
        "I add.\n\nDone.\nTruly.\n",
        2,
    ),
    "words after a call": (f"{CALL}\nDone.", None, "Done.", 1),
    "broken call": (f"See:\n{BROKEN}\nend", None, f"See:\n{BROKEN}\nend", 0),
    "broken call then call": (f"{BROKEN}\n{CALL}", None, BROKEN, 1),
    "call then broken call": (f"{CALL}\n{BROKEN}", None, BROKEN, 1),
    "unclosed call": (
        f"x{CALL.removesuffix('</tool_call>')}",
        None,
        f"x{CALL.removesuffix('</tool_call>')}",
        0,
    ),
    "unclosed then call": (f'<tool_call>\n{{"name": "\n{CALL}', None, f'<tool_call>\n{{"name": "\n{CALL}', 0),
    "call in thinking is thinking": (f"<think>{CALL}</think>ok", CALL, "ok", 0),
    "no object": ("<tool_call>[1]</tool_call>", None, "<tool_call>[1]</tool_call>", 0),
    "no name": (
        '<tool_call>{"arguments": {}}</tool_call>',
        None,
        '<tool_call>{"arguments": {}}</tool_call>',
        0,
    ),
    "not a number": (
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        None,
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        0,
    ),
    "half a character": (
        '<tool_call>{"name": "\\ud83d"}</tool_call>',
        None,
        '<tool_call>{"name": "\\ud83d"}</tool_call>',
        0,
    ),
    "arguments as a string": (
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        None,
        "",
        1,
    ),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', None, "", 1),
    "almost a tag": ("a\n<tool_cal b", None, "a\n<tool_cal b", 0),
}

tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "<tool", "</", "think>"]
fragments = st.sampled_from([*tags, CALL, BROKEN, '{"name": "f"}', '"', "{", "\n", "\n\n", " ", "a", "é"])
replies = st.lists(fragments, max_size=14).map("".join)
quoteless = fragments.filter(
    lambda fragment: fragment != '"'
)  # a lone quote may hide a closing tag in a string


def naive_reply(text: str) -> tuple[str, str, tuple[ToolCall, ...]]:
    """The whole reply by expressions: thinking, then texts between the calls that can be read."""
    thinking = re.match(r"\s*<think>(.*?)(</think>|\Z)", text, re.DOTALL)
    rest = text[thinking.end() :] if thinking else text
    texts, found = [""], []
    for number, part in enumerate(re.split(r"<tool_call>(.*?)</tool_call>", rest, flags=re.DOTALL)):
        try:
            call = msgspec.json.decode(part, type=Written) if number % 2 else None
        except msgspec.DecodeError:
            texts[-1] += f"<tool_call>{part}</tool_call>"
            continue
        if call is None:
            texts[-1] += part
        else:
            found.append(ToolCall(name=call.name, arguments=call.arguments))
            texts.append("")
    joined = [*(text.lstrip("\n").removesuffix("\n") for text in texts[:-1]), texts[-1].lstrip("\n")]
    return thinking[1].strip("\n") if thinking else "", "\n".join(filter(None, joined)), tuple(found)


class Written(msgspec.Struct):
    name: str
    arguments: dict[str, Any] = {}


@pytest.mark.parametrize("case", CASES)
def test_a_reply_is_read_into_its_parts(case: str) -> None:
    text, reasoning, content, num_calls = CASES[case]
    message = parse_reply(text)
    # Where an answer spells the closing tag, "" keeps the chat format from cutting the answer there.
    assert message.reasoning_content == (reasoning or ("" if "</think>" in content else None))
    assert message.content == content
    assert len(message.tool_calls) == num_calls
    if CALL in text and num_calls:
        assert message.tool_calls == (ADD,) * num_calls


def test_arguments_may_spell_the_closing_tag() -> None:
    arguments = {"code": "print('</tool_call>')\n</tool_call><tool_call>", "n": 1}
    text = f'<tool_call>\n{{"name": "run", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
    assert parse_reply(text).tool_calls == (ToolCall(name="run", arguments=arguments),)


def test_thinking_may_be_opened_by_the_prompt() -> None:
    message = parse_reply("so\n</think>\n\n4.", thinking=True)
    assert (message.reasoning_content, message.content) == ("so", "4.")
    unfinished = parse_reply("so on", thinking=True)
    assert (unfinished.reasoning_content, unfinished.content) == ("so on", "")


def test_text_is_passed_on_as_soon_as_it_is_certain() -> None:
    parser = ReplyParser()
    assert parser.feed("<thi") == []
    assert parser.feed("nk>\nso") == [Delta("reasoning", "so")]
    assert parser.feed(" far\n") == [Delta("reasoning", " far")]
    assert parser.feed("\n</") == []
    assert parser.feed("think>\n") == []
    assert parser.feed("\nI add.") == [Delta("content", "I add.")]
    assert parser.feed("\n") == []
    assert parser.feed("<b> now\n<tool_") == [Delta("content", "\n<b> now")]
    assert parser.feed(CALL.removeprefix("<tool_")) == [Delta("tool_call", tool_call=ADD)]
    assert parser.feed("\n") == []
    assert parser.feed("ok") == [Delta("content", "\nok")]
    assert parser.close() == []


@settings(deadline=None, max_examples=600)
@given(text=replies, cuts=st.lists(st.integers(0, 200), max_size=12), thinking=st.booleans())
def test_streaming_reads_the_same_as_the_whole_for_any_cut(
    text: str, cuts: list[int], thinking: bool
) -> None:
    whole = parse_reply(text, thinking=thinking)
    places = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    for cut in (pieces, list(text)):
        parser = ReplyParser(thinking=thinking)
        deltas = [delta for piece in cut for delta in parser.feed(piece)] + parser.close()
        assert parser.message() == whole
        assert "".join(delta.text for delta in deltas if delta.kind == "content") == whole.content
        assert "".join(delta.text for delta in deltas if delta.kind == "reasoning") == (
            whole.reasoning_content or ""
        )
        assert tuple(delta.tool_call for delta in deltas if delta.kind == "tool_call") == whole.tool_calls


@settings(deadline=None, max_examples=300)
@given(text=st.lists(quoteless, max_size=14).map("".join))
def test_a_reply_is_read_like_by_plain_expressions(text: str) -> None:
    message = parse_reply(text)
    assert ((message.reasoning_content or ""), message.content, message.tool_calls) == naive_reply(text)
