"""Watching a run: what a frame shows, by files alone, while a stage is under way, done, cut back or not begun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pensar.base.manifest import Manifest, Timings, folder_name, write_manifest
from pensar.base.metrics import Metrics
from pensar.cli import main
from pensar.cli.braille import curve, sparkline, squeezed
from pensar.cli.follow import Run, Tail
from pensar.cli.watch import frame

NAME = folder_name("pretrain-general", "ab" * 32)
LOSSES = {
    "steps": 2,
    "domain": {"web": {"loss": 3.0, "tokens": 10.0}, "books": {"loss": 2.0, "tokens": 30.0}},
    "language": {"eng_Latn": {"loss": 2.25, "tokens": 40.0}},
}
LAYERS = {"gradient_norm": {"embedding": 1.0, "attention": [0.5, 0.25]}, "stream_rms": [0.1, 1.0, 4.0]}


def write_steps(root: Path, steps: int, of: int, draft: bool = True) -> Path:
    """A stage's folder with its records, as training leaves them."""
    folder = root / f"{NAME}{'.draft' if draft else ''}"
    with Metrics(folder, root / "logs" / NAME) as metrics:
        metrics.about(name="pre-training, general", steps=of)
        for step in range(steps):
            metrics.log(step, loss=8.0 - step, gradient_norm=1.0, lr=0.01, tokens=1000.0)
            metrics.timing(step, seconds=0.5, tokens_per_second=2000.0, flops_per_second=3e9, mfu=0.25)
        metrics.note("losses", steps - 1, LOSSES)
        metrics.note("layers", steps - 1, LAYERS)
    return folder


def finish(root: Path, steps: int) -> None:
    folder = write_steps(root, steps, steps, draft=False)
    times = Timings(
        seconds=4.0, cpu_seconds=4.0, peak_memory_bytes=1, ranks=1, resumed=False, finished="2026"
    )
    write_manifest(
        folder,
        Manifest(
            stage="pretrain-general", revision=1, fingerprint="ab" * 32, inputs={}, config={}, outside={}, files={},
            counts={}, versions={}, timings=times,
        ),
    )  # fmt: skip


def old(root: Path) -> None:
    """Everything was written an hour ago, by a process that is no more."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 3600, time.time() - 3600))


def shown(state: dict[str, Any], width: int = 250) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(frame(state))
        return console.export_text()


def test_a_stage_under_way_is_told_by_its_draft(tmp_path: Path) -> None:
    write_steps(tmp_path, 5, of=20)
    state = Run(tmp_path).look()
    training = state["training"]
    assert state["under_way"]
    assert state["stages"] == [
        {"stage": "pretrain-general", "folder": f"{NAME}.draft", "status": "under way"}
    ]
    assert (training["step"], training["steps"], training["tokens"]) == (5, 20, 5000)
    assert training["seconds_left"] == 7.5
    assert training["series"]["loss"] == [8.0, 7.0, 6.0, 5.0, 4.0]
    assert (training["tokens_per_second"], training["mfu"]) == (2000.0, 0.25)
    assert training["losses"]["domain"]["books"]["loss"] == 2.0
    text = shown(state)
    for words in (
        "0 stages done, pretrain-general under way", "5/20 steps, 5K tokens, 7.5 s left", "2K tokens/s", "MFU 25%",
        "now 4", "gradient_norm", "loss by domain, the last 2 steps", "size of stream", "at most 4",
    ):  # fmt: skip
        assert words in text
    assert text.index("books") < text.index("  web")
    assert "loss by language" not in text, "one group tells nothing"


def test_a_run_that_nobody_works_on_says_so(tmp_path: Path) -> None:
    write_steps(tmp_path, 5, of=20)
    old(tmp_path)
    state = Run(tmp_path).look()
    assert not state["under_way"]
    assert "pretrain-general begun; nobody at work" in shown(state)
    (tmp_path / ".lock").write_text(f"{os.getpid()}\n")
    assert Run(tmp_path).look()["under_way"]
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    (tmp_path / ".lock").write_bytes(ended.stdout)
    assert not Run(tmp_path).look()["under_way"]


def test_a_finished_stage_is_shown_from_its_artifact(tmp_path: Path) -> None:
    finish(tmp_path, 6)
    old(tmp_path)
    for folder in (tmp_path, tmp_path / NAME):
        state = Run(folder).look()
        assert [(stage["stage"], stage["status"]) for stage in state["stages"]] == [
            ("pretrain-general", "done")
        ]
        assert state["training"]["finished"]
        assert (state["training"]["step"], state["training"]["seconds_left"]) == (6, 0.0)
    assert "1 stage done; nobody at work" in shown(state)
    assert " left" not in shown(state)


def test_rows_that_a_run_takes_back_are_taken_back(tmp_path: Path) -> None:
    write_steps(tmp_path, 5, of=20)
    run = Run(tmp_path)
    assert run.look()["training"]["step"] == 5
    with Metrics(tmp_path / f"{NAME}.draft", tmp_path / "logs" / NAME) as metrics:
        metrics.rewind(1)
        assert run.look()["training"]["step"] == 2
        metrics.log(2, loss=3.5, tokens=1000.0)
        assert run.look()["training"]["series"]["loss"] == [8.0, 7.0, 3.5]


def test_only_whole_lines_and_only_new_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.look() == []
    path.write_text('{"step":0}\n{"step":1')
    assert tail.look() == [{"step": 0}]
    with path.open("a") as file:
        file.write('}\n{"step":2}\n')
    assert tail.look() == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert tail._read == path.stat().st_size


def test_files_that_vanish_and_values_that_are_none_do_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_steps(tmp_path, 3, of=20)
    logs = tmp_path / "logs" / NAME
    (logs / ".about.json.tmp").write_text("{")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step":3,"loss":null,"tokens":1000.0,"gradient_norm":null}\n')
    with (folder / "layers.jsonl").open("a") as file:
        file.write('{"step":3,"gradient_norm":{"attention":[0.5,null],"mlp":[]},"stream_rms":[1.0,2.0]}\n')
    training = Run(tmp_path).look()["training"]
    assert training["step"] == 4
    assert training["series"]["loss"] == [8.0, 7.0, 6.0]
    text = shown(Run(tmp_path).look())
    assert "size of stream" in text
    assert "gradient attention" not in text
    found = Path.glob

    def with_one_gone(self: Path, pattern: str) -> Any:
        return [*found(self, pattern), self / "gone.jsonl"]

    monkeypatch.setattr(Path, "glob", with_one_gone)
    assert Run(tmp_path)._written(NAME) == max(
        path.stat().st_mtime for path in logs.iterdir() if path.stem[0] != "."
    )
    assert Tail(logs / "gone.jsonl").look() == []


def test_a_run_without_training_is_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "no stage has trained yet" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "nowhere")]) == 1
    assert "is no folder; give a run's folder" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--every", "0"]) == 2


def test_one_frame_and_one_document_go_through_a_pipe(tmp_path: Path) -> None:
    write_steps(tmp_path, 5, of=20)
    command = [sys.executable, "-m", "pensar", "watch", str(tmp_path)]
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "5/20 steps" in plain.stdout
    assert "\x1b" not in plain.stdout
    document = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert document["training"]["step"] == 5
    code = (
        "import sys; from pensar.cli import main\n"
        f"main(['watch', {str(tmp_path)!r}, '--once'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """The dots of a chart as (column, row from the bottom), read from the Unicode numbering of the dots."""
    places = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))
    found = set()
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            for bit, (right, down) in enumerate(places):
                if (ord(character) - 0x2800) >> bit & 1:
                    found.add((2 * column + right, 4 * len(lines) - 1 - (4 * row + down)))
    return found


def test_a_curve_has_its_values_at_their_heights() -> None:
    assert dots(curve([0, 1, 2, 3], 2, 1)) == {(0, 0), (1, 1), (2, 2), (3, 3)}
    assert dots(curve([0, 7], 1, 2)) == {(0, 0), *((1, row) for row in range(1, 8))}
    assert dots(curve([7, 0], 1, 2)) == {(0, 7), *((1, row) for row in range(7))}
    assert dots(curve([5, 5], 1, 1)) == {(0, 0), (1, 0)}
    assert curve([], 3, 2) == ["\u2800" * 3] * 2
    assert all(len(line) == 9 for line in curve(list(range(1000)), 9, 3))


def test_sparklines_go_from_the_lowest_bar_to_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3], 5) == "▁▁"
    assert squeezed([1, 3, 5, 7], 2) == [2, 6]
    assert squeezed([1, 2], 5) == [1, 2]
