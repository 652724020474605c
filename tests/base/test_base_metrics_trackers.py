"""Trackers: each is shown every step once, whatever was killed in between, and only those asked for are loaded."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pensar.base.errors import ConfigError
from pensar.base.metrics import Metrics, Recording
from pensar.base.trackers import Tracked, require

LOSSES = {"domain": {"web": {"loss": 2.5, "tokens": 10.0}}, "rms": [1.0, 2.0]}


def records(path: Path) -> Iterator[bytes]:
    """The records of an event file: length, its checksum, content, its checksum."""
    content = path.read_bytes()
    at = 0
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        yield content[at + 12 : at + 12 + size]
        at += 16 + size


def test_a_run_that_goes_back_takes_its_events_back(tmp_path: Path) -> None:
    """TensorBoard leaves out what an event of a new start says was after its step."""
    from tensorboardX.proto import event_pb2

    cut_and_resumed(tmp_path, ("tensorboard",))
    scalars: dict[tuple[str, int], list[float]] = {}
    for path in sorted((tmp_path / "logs" / "tensorboard").iterdir()):
        for record in records(path):
            event = event_pb2.Event.FromString(record)
            if event.session_log.status == event_pb2.SessionLog.START:
                scalars = {key: values for key, values in scalars.items() if key[1] < event.step}
            for value in event.summary.value:
                scalars.setdefault((value.tag, event.step), []).append(round(value.simple_value, 4))
    assert {key: values for key, values in scalars.items() if key[0] == "loss"} == {
        ("loss", step): [round(1 / (step + 1), 4)] for step in range(6)
    }
    assert scalars["losses/domain/web/loss", 3] == [2.5]
    assert scalars["losses/rms/1", 3] == [2.0]


def cut_and_resumed(folder: Path, trackers: tuple[str, ...]) -> None:
    """Six steps: killed after the fifth with a checkpoint after the second, and once more after the fourth."""
    out, logs = folder / "tiny" / "stage.draft", folder / "logs"
    recording = Recording(trackers=trackers)
    for first, last in ((0, 5), (2, 4), (2, 6)):
        with Metrics(out, logs, recording) as metrics:
            metrics.rewind(first - 1)
            for step in range(first, last):
                metrics.log(step, loss=1 / (step + 1))
                metrics.timing(step, seconds=0.1)
                if step == 3:
                    metrics.note("losses", step, LOSSES)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_sees_each_step_once(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    cut_and_resumed(tmp_path, ("mlflow",))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name(tmp_path.parent.name).experiment_id])
    history = sorted((m.step, round(m.value, 4)) for m in client.get_metric_history(run.info.run_id, "loss"))
    assert history == [(step, round(1 / (step + 1), 4)) for step in range(6)]
    assert len(client.get_metric_history(run.info.run_id, "losses/domain/web/loss")) == 1
    assert (run.info.run_name, run.info.status) == ("logs", "FINISHED")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_keeps_one_run_and_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    cut_and_resumed(tmp_path, ("wandb",))
    states = msgspec.json.decode((tmp_path / "logs" / "trackers.json").read_bytes(), type=dict[str, Tracked])
    runs = list((tmp_path / "logs" / "wandb").glob(f"offline-run-*-{states['wandb'].run}*"))
    assert runs
    assert len(runs) == len(list((tmp_path / "logs" / "wandb").glob("offline-run-*")))
    seen: list[tuple[int, float]] = []
    for folder in runs:
        for data in logged(next(folder.glob("*.wandb"))):
            record = wandb_internal_pb2.Record.FromString(data)
            items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "loss" in items:
                seen.append((int(items["_step"]), round(float(items["loss"]), 4)))
    assert sorted(seen) == [(step, round(1 / (step + 1), 4)) for step in range(6)]


def logged(path: Path) -> Iterator[bytes]:
    """The records of LevelDB's log format, behind 7 bytes: blocks of 32 KiB, across which records are cut."""
    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_trackio_keeps_one_run_and_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; import test_base_metrics_trackers as own\n"
        "own.cut_and_resumed(Path(sys.argv[2]), ('trackio',))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=True, env=environment
    )
    import sqlite3

    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    losses = [(step, round(values["loss"], 4)) for _, step, values in decoded(rows) if "loss" in values]
    assert sorted(losses) == [(step, round(1 / (step + 1), 4)) for step in range(6)]
    assert len({run for run, _, _ in rows}) == 1


def decoded(rows: list[tuple[str, int, str]]) -> Iterator[tuple[str, int, dict[str, float]]]:
    for run, step, metrics in rows:
        yield run, step, msgspec.json.decode(metrics)


def test_a_tracker_that_there_is_not_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'mlfow' is no tracker; did you mean `?mlflow.*There are tensorboard"
    ):
        require(["tensorboard", "mlfow"])
    with pytest.raises(ConfigError, match="'mlfow' is no tracker"):
        Metrics(tmp_path, tmp_path / "logs", Recording(trackers=("mlfow",)))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="names trackio, which is not installed; pip install trackio, or leave"
    ):
        require(["trackio"])


def test_no_tracker_at_all_leaves_the_record(tmp_path: Path) -> None:
    with Metrics(tmp_path / "out", tmp_path / "logs", Recording(trackers=())) as metrics:
        metrics.log(0, loss=1.0)
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"step":0,"loss":1.0}\n'
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["timings.jsonl"]
