"""Metrics: rows that survive a crash, times apart from values; and progress in its three forms."""

import io
import json
import pickle
from pathlib import Path

import pytest

from pensar.base.metrics import Metrics
from pensar.base.progress import LineProgress, Progress, RichProgress


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_values_and_times_go_to_their_files(tmp_path: Path) -> None:
    with Metrics(tmp_path / "out", tmp_path / "logs") as metrics:
        metrics.log(1, loss=2.5)
        metrics.timing(1, tokens_per_second=1000)
        metrics.log(2, loss=2.25)
    assert (
        tmp_path / "out" / "metrics.jsonl"
    ).read_text() == '{"step":1,"loss":2.5}\n{"step":2,"loss":2.25}\n'
    assert rows(tmp_path / "logs" / "timings.jsonl") == [{"step": 1, "tokens_per_second": 1000.0}]
    assert list((tmp_path / "logs" / "tensorboard").glob("events.out.*"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl"]


def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    with Metrics(tmp_path / "whole", tmp_path / "logs1") as metrics:
        for step in range(6):
            metrics.log(step, loss=1 / (step + 1))
    with Metrics(tmp_path / "cut", tmp_path / "logs2") as metrics:
        for step in range(5):
            metrics.log(step, loss=1 / (step + 1))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step":5,"lo')
    with Metrics(tmp_path / "cut", tmp_path / "logs2") as metrics:
        metrics.rewind(2)
        for step in range(3, 6):
            metrics.log(step, loss=1 / (step + 1))
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


def test_rewinding_before_the_start_empties_the_file(tmp_path: Path) -> None:
    with Metrics(tmp_path, tmp_path / "logs") as metrics:
        metrics.log(0, loss=1)
        metrics.rewind(-1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_lines_show_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr("pensar.base.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with LineProgress(stream, every=9).track("S1", total=100) as track:
        track.advance(5)
        track.advance(5, loss=2.34567, mode="thinking")
        track.advance(5)
        track.advance(25)
    assert stream.getvalue().splitlines() == [
        "S1: 10/100 step, 1 step/s, 90 s left, loss 2.346, mode thinking",
        "S1: 40/100 step, 2 step/s, 30 s left",
    ]


@pytest.mark.parametrize("progress", [Progress(), LineProgress(), RichProgress()])
def test_every_form_tracks_nested_work_and_travels_silently(progress: Progress) -> None:
    with progress.track("outer", 2, unit="stage") as outer:
        with progress.track("inner") as inner:
            inner.advance(3, loss=1.5)
        outer.advance()
    with progress.track("again", 1) as again:
        again.advance()
    assert type(pickle.loads(pickle.dumps(progress))) is Progress
