"""A reply on its way out: stop strings over any cut of the text, and the metrics' format."""

import random

import pytest

from pensar.infer.engine import Piece
from pensar.infer.stops import StopStrings
from pensar.serve.metrics import Counter, Histogram
from pensar.serve.reply import Reply
from pensar.text.reply import ReplyParser
from pensar.text.tokenizer import Tokenizer


def cut_at_first(text: str, stops: list[str]) -> str:
    """What should come out: everything before the stop string that is complete first."""
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            return text[: min(found)]
    return text


def test_the_stop_string_that_is_complete_first_cuts_the_text() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        text = "".join(draw.choices("abc", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("abc", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        filter_ = StopStrings(stops)
        # Character by character, as the oracle reads.
        out = "".join(map(filter_.feed, text)) + filter_.close()
        assert out == cut_at_first(text, stops), (text, stops)


def test_nothing_that_may_become_a_stop_string_is_let_out() -> None:
    filter_ = StopStrings(["END"])
    assert [filter_.feed(text) for text in ("a E", "N", "x E", "ND b")] == ["a ", "", "ENx ", ""]
    assert filter_.hit
    assert filter_.close() == ""


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_character_cut_by_a_token_border_comes_out_whole(tokenizer: Tokenizer, size: int) -> None:
    text = "Évora 日本語 🙂"
    ids = tokenizer.encode(text)
    reply = Reply(tokenizer, ReplyParser())
    shown = []
    for start in range(0, len(ids), size):
        reason = "stop" if start + size >= len(ids) else None
        piece = Piece(
            id="0",
            tokens=ids[start : start + size],
            logprobs=None,
            forced=[],
            finish_reason=reason,
            reasoning_tokens=0,
        )
        shown += [delta.text for delta in reply.feed(piece)]
    assert "".join(shown) == reply.content == text
    assert "\ufffd" not in "".join(shown)
    assert reply.accounts.completion_tokens == len(ids)


def test_metrics_are_written_as_prometheus_reads_them() -> None:
    counter = Counter("n_total", "Things.")
    counter.add(2, kind='a"b\\c\n')
    assert list(counter.lines())[1:] == ["# TYPE n_total counter", 'n_total{kind="a\\"b\\\\c\\n"} 2']
    histogram = Histogram("t_seconds", "Time.", bounds=(0.1, 1))
    for seconds in (0.1, 0.5, 3):
        histogram.observe(seconds)
    assert list(histogram.lines())[2:] == [
        't_seconds_bucket{le="0.1"} 1',
        't_seconds_bucket{le="1"} 2',
        't_seconds_bucket{le="+Inf"} 3',
        "t_seconds_sum 3.6",
        "t_seconds_count 3",
    ]
