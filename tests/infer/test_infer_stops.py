import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pensar.base.errors import ModelError
from pensar.infer.budget import Thinking
from pensar.infer.stops import Match, StopMatcher, StopStrings
from pensar.text.tokenizer import THINK, THINK_END, TURN_END, TURN_START

LETTERS = "abä\n"


def naive(text, stops):
    """Begin and end of the stop string that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        sizes = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if sizes:
            return end - max(sizes), end
    return None


@settings(max_examples=400, deadline=None)
@given(
    st.text(LETTERS, max_size=24),
    st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_any_cutting_of_a_text_stops_where_the_first_stop_string_is_complete(text, stops, seed):
    found, dice = naive(text, stops), random.Random(seed)
    strings, shown, rest = StopStrings(stops), "", text
    while rest:
        size = dice.randint(1, 4)
        shown += strings.feed(rest[:size])
        rest = rest[size:]
        at = len(text) - len(rest)
        # Never a character that belongs to the stop string, and never more held back than could belong to one.
        assert shown == text[: len(shown)]
        assert len(shown) <= (found[0] if found else len(text))
        if not strings.hit:
            held = text[len(shown) : at]
            assert not held or any(stop.startswith(held) for stop in stops)
    shown += strings.close()
    assert strings.hit == (found is not None)
    assert strings.begin == (found[0] if found else None)
    assert shown == (text[: found[0]] if found else text)


def test_too_many_too_long_and_empty_stop_strings_are_refused():
    StopStrings(["x" * 256] * 16)
    for stops in (["x"] * 17, ["x" * 257], [""]):
        with pytest.raises(ModelError, match="stop string"):
            StopStrings(stops)


def test_sixteen_long_stop_strings_cost_little_per_character():
    stops = ["ab" * 100 + chr(ord("c") + number) for number in range(16)]
    strings = StopStrings(stops)
    text = "ab" * 20_000
    assert strings.feed(text) == text[:-200]
    assert strings.feed("d") == ""
    assert strings.hit


@pytest.fixture
def matcher(tokenizer):
    def make(stops, prompt=(), thinking=True):
        machine = Thinking(tokenizer) if thinking else None
        phase = 2 if machine is None else machine.phase_of(np.asarray(prompt, np.int64))
        return StopMatcher(tokenizer, stops, machine, phase)

    return make


def bytes_of(tokenizer, text):
    """One token per byte."""
    single = {tokenizer.decode_bytes([token]): token for token in range(256)}
    return [single[bytes([byte])] for byte in text.encode()]


def test_a_match_names_the_token_that_completes_it_and_the_character_where_it_begins(tokenizer, matcher):
    tokens = tokenizer.encode("the cat sat on the mat")
    text, at = "", None
    for index, token in enumerate(tokens):
        text += tokenizer.decode([token])
        if at is None and "sat on" in text:
            at = index
    found = matcher(["sat on", "mat"])
    assert found.feed(tokens) == Match(at, len("the cat "))
    assert found.feed(tokens) == Match(at, len("the cat "))
    assert found.safe_tokens <= at


def test_a_stop_string_is_found_inside_characters_that_several_tokens_spell(tokenizer, matcher):
    tokens = bytes_of(tokenizer, "aé日b")
    assert len(tokens) == 7
    found = matcher(["日"])
    safe = []
    for token in tokens:
        found.feed([token])
        safe.append(found.safe_tokens)
    assert found.match == Match(5, 2)
    # The tokens of é may be shown when it is complete; no byte of 日 ever.
    assert safe == [1, 1, 3, 3, 3, 3, 3]


def test_tokens_wait_while_they_may_belong_to_a_stop_string(tokenizer, matcher):
    found = matcher(["abc"])
    safe = []
    for token in bytes_of(tokenizer, "xababx"):
        found.feed([token])
        safe.append(found.safe_tokens)
    assert safe == [1, 1, 1, 3, 3, 6]
    assert found.match is None


def test_the_thinking_block_and_the_line_feeds_after_it_are_not_searched(tokenizer, matcher):
    open_id, close_id = tokenizer.special(THINK), tokenizer.special(THINK_END)
    inside = [open_id, *tokenizer.encode("\none cat\n"), close_id, *tokenizer.encode("\n\n")]
    reply = [*inside, *tokenizer.encode("two cat")]
    found = matcher(["cat", "\n\n"])
    match = found.feed(reply)
    assert match is not None
    assert tokenizer.decode(reply, skip_special=True)[: match.begin].endswith("two ")
    assert match.token == len(reply) - 1
    # The same when the prompt opened or closed the block.
    assert matcher(["cat"], [open_id]).feed(inside[1:]) is None
    assert matcher(["\n\n"], [open_id, close_id]).feed(tokenizer.encode("\n\none")) is None
    assert matcher(["\n"]).feed(tokenizer.encode("\none")) == Match(0, 0)


def test_the_name_of_a_turn_mark_stops_at_the_token(tokenizer, matcher):
    mark = tokenizer.special(TURN_START)
    text = tokenizer.encode("one")
    found = matcher([TURN_START, "xyz"])
    assert found.feed([*text, mark]) == Match(len(text), 3)
    assert matcher([TURN_START]).feed([*text, tokenizer.special(TURN_END)]) is None
