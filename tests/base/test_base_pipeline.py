"""The pipeline: verdicts with reasons, resumption after kill -9, the lock, adoption, lineage, and bad luck."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from pensar.base.errors import ConfigError, DataError, RunError
from pensar.base.identity import fingerprint
from pensar.base.lineage import ancestors, descendants, open_artifact
from pensar.base.manifest import read_manifest
from pensar.base.pipeline import Choice, execute, plan
from pensar.base.stage import Runtime, Stage

HERE = Path(__file__).parent


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HERE))
    import pipeline_work

    return pipeline_work


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(str(n) for n in range(1, 41)))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "small"


def verdicts(recipe: list[Stage], root: Path, choice: Choice | None = None) -> dict[str, str]:
    return {
        item.name: item.status + (f" ({item.reason})" if item.reason else "")
        for item in plan(recipe, root, choice or Choice())
    }


def content(root: Path) -> dict[str, object]:
    """Every artifact's bytes; of manifests all but the timings."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or name.startswith(("logs/", "model/", ".lock")):
            continue
        found[name] = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(path.read_bytes())
            del manifest["timings"]
            found[name] = manifest
    return found


def test_everything_is_new_then_done(work: ModuleType, source: Path, root: Path) -> None:
    recipe = work.stages(source)
    assert set(verdicts(recipe, root).values()) == {"new"}
    outcomes = work.go(recipe, root)
    assert [(outcome.planned.name, outcome.ran) for outcome in outcomes] == [
        ("source", True), ("shards", True), ("other", True), ("train", True),
    ]  # fmt: skip
    assert set(verdicts(recipe, root).values()) == {"done"}
    assert [outcome.ran for outcome in work.go(recipe, root)] == [False] * 4
    weight = json.loads((root / "model" / "checkpoint.json").read_text())["weight"]
    assert weight == pytest.approx(0.003 * 2 * 3 * sum(range(1, 41)))


def test_the_manifest_tells_what_was_done(work: ModuleType, source: Path, root: Path) -> None:
    outcome = work.go(work.stages(source, train=work.TrainConfig(lr=0.25)), root)[-1]
    manifest = read_manifest(root / "model")
    assert manifest == outcome.manifest
    assert manifest.config == {"lr": 0.25}
    assert manifest.counts == {"steps": 12}
    assert set(manifest.files) == {"checkpoint.json", "metrics.jsonl"}
    assert manifest.files["metrics.jsonl"].bytes == (root / "model" / "metrics.jsonl").stat().st_size
    assert manifest.inputs["shards"].folder.startswith("shards-")
    assert manifest.versions["msgspec"] == msgspec.__version__
    times = manifest.timings
    assert 0 < times.seconds < 60
    assert times.cpu_seconds > 0
    assert 2**20 < times.peak_memory_bytes < 2**36
    log = next((root / "logs").glob("shards-*")) / "stage.log"
    assert "wrote shard 3" in log.read_text()


def test_the_fingerprint_depends_on_identity_alone(work: ModuleType) -> None:
    def of(**changes: object) -> str:
        values = {
            "name": "a",
            "run": work.train,
            "config": work.TrainConfig(),
            "inputs": {"x": "b"},
            **changes,
        }
        return fingerprint(Stage(**values), {"x": "f" * 64})  # type: ignore[arg-type]

    same = {of(), of(run=work.write_shards), of(config=work.TrainConfig(lr=0.003))}
    assert len(same) == 1
    Newer = msgspec.defstruct(
        "Newer", [("extra", int, 7)], bases=(work.TrainConfig,), frozen=True, kw_only=True
    )
    assert of(config=Newer()) in same, "a new field with its default keeps what is done"
    others = {of(name="b"), of(revision=2), of(config=work.TrainConfig(lr=0.01)), of(config=Newer(extra=8))}
    assert len(others | same) == 5
    stage = Stage("a", work.train, work.TrainConfig())
    assert fingerprint(stage, {"x": "f"}) != fingerprint(stage, {"y": "f"}) != fingerprint(stage, {}, ["f"])


def test_the_plan_says_why(work: ModuleType, source: Path, root: Path) -> None:
    work.go(work.stages(source), root)
    assert verdicts(work.stages(source, train=work.TrainConfig(lr=0.001)), root) == {
        "source": "done",
        "shards": "done",
        "other": "done",
        "train": "stale (lr: 0.003 -> 0.001)",
    }
    changed = work.stages(source, shards=work.ShardConfig(factor=3, note="x"), other_revision=2)
    assert verdicts(changed, root) == {
        "source": "done",
        "shards": "stale (factor: 2 -> 3; note:  -> x)",
        "other": "stale (revision 1 -> 2)",
        "train": "stale (input shards changed)",
    }
    source.write_text("1 2 3")
    assert verdicts(work.stages(source), root) == {
        "source": f"stale (outside file {source} changed)",
        "shards": "stale (input source changed)",
        "other": "stale (input source changed)",
        "train": "stale (input shards changed)",
    }
    rewired = [*work.stages(source)[:3], Stage("train", work.train, work.TrainConfig(), {"shards": "other"})]
    assert verdicts(rewired, root)["train"] == "stale (input shards: shards -> other)"


def test_earlier_artifacts_are_kept_and_found_again(work: ModuleType, source: Path, root: Path) -> None:
    work.go(work.stages(source), root)
    first = (root / "model").resolve()
    work.go(work.stages(source, train=work.TrainConfig(lr=0.001)), root)
    assert (root / "model").resolve() != first
    assert [outcome.ran for outcome in work.go(work.stages(source), root)] == [False] * 4
    assert (root / "model").resolve() == first
    assert (root / "model").readlink() == Path(first.name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("kill")
    source = folder / "numbers.txt"
    source.write_text(" ".join(str(n) for n in range(1, 41)))
    subprocess.run(
        [sys.executable, str(HERE / "pipeline_work.py"), str(folder / "whole"), str(source)], check=True
    )
    return source, content(folder / "whole")


def test_a_run_killed_at_random_points_ends_with_the_same_bytes(
    uninterrupted: tuple[Path, dict[str, object]], root: Path
) -> None:
    source, expected = uninterrupted
    moments = random.Random(7)
    command = [sys.executable, str(HERE / "pipeline_work.py"), str(root), str(source)]
    killed = 0
    for _ in range(6):
        process = subprocess.Popen([*command, "0.06"])
        # The clock starts when the process holds the lock: starting Python is no part of the run.
        while process.poll() is None and not _holds_lock(root, process.pid):
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 4, "the run was over too soon to be interrupted"
    subprocess.run(command, check=True)
    assert content(root) == expected


def _holds_lock(root: Path, pid: int) -> bool:
    lock = root / ".lock"
    return lock.exists() and lock.read_text().strip() == str(pid)


def test_two_runs_cannot_share_a_folder(work: ModuleType, source: Path, root: Path) -> None:
    command = [sys.executable, str(HERE / "pipeline_work.py"), str(root), str(source), "0.5"]
    process = subprocess.Popen(command)
    try:
        while not _holds_lock(root, process.pid):
            time.sleep(0.01)
        with pytest.raises(
            RunError, match=rf"small is in use by process {process.pid}; wait .* `kill {process.pid}`"
        ):
            work.go(work.stages(source), root)
    finally:
        process.kill()
        process.wait()
    work.go(work.stages(source), root)


def test_until_from_and_only_choose_a_part(work: ModuleType, source: Path, root: Path) -> None:
    recipe = work.stages(source)

    def ran(choice: Choice) -> list[str]:
        return [outcome.planned.name for outcome in work.go(recipe, root, choice) if outcome.ran]

    assert ran(Choice(until="shards")) == ["source", "shards"]
    assert ran(Choice(only=("train",))) == ["train"]
    assert ran(Choice()) == ["other"]
    before = read_manifest(root / "model").timings.finished
    assert verdicts(recipe, root, Choice(from_="other")) == {
        "source": "done",
        "shards": "done",
        "other": "stale (asked for with --from)",
        "train": "stale (asked for with --from)",
    }
    assert ran(Choice(from_="other")) == ["other", "train"]
    assert read_manifest(root / "model").timings.finished > before
    assert len(list(root.glob("train-*.old-1"))) == 1, "the earlier artifact is kept"
    with pytest.raises(ConfigError, match="no stage is called `trian`; did you mean `train`"):
        plan(recipe, root, Choice(until="trian"))


def test_from_survives_a_run_cut_short(work: ModuleType, source: Path, root: Path) -> None:
    recipe = work.stages(source)
    work.go(recipe, root)
    running = execute(recipe, root, Runtime(logs=root / "logs"), Choice(from_="shards"))
    assert [next(running).planned.name for _ in range(2)] == ["source", "shards"]
    running.close()
    assert verdicts(recipe, root)["train"] == "new"


def test_damaged_artifacts_are_reported_and_done_anew(work: ModuleType, source: Path, root: Path) -> None:
    recipe = work.stages(source)
    work.go(recipe, root)
    whole = content(root)
    shards = next(root.glob("shards-*")) / "shards"
    (shards / "1.txt").unlink()
    (next(root.glob("other-*")) / "shards" / "0.txt").write_text("short")
    assert verdicts(recipe, root) == {
        "source": "done",
        "shards": "stale (damaged: file shards/1.txt is missing)",
        "other": "stale (damaged: file shards/0.txt has 5 bytes, 33 recorded)",
        "train": "done",
    }
    work.go(recipe, root)
    assert {name: data for name, data in content(root).items() if ".damaged-1/" not in name} == whole
    checkpoint = root / "model" / "checkpoint.json"
    checkpoint.write_bytes(checkpoint.read_bytes().replace(b"12", b"13"))
    assert verdicts(recipe, root)["train"] == "done"
    assert verdicts(recipe, root, Choice(verify=True))["train"].startswith(
        "stale (damaged: file checkpoint.json has changed"
    )
    (next(root.glob("source-*")) / "manifest.json").write_text("{")
    assert verdicts(recipe, root)["source"] == "stale (damaged: manifest.json cannot be read)"


def test_a_draft_is_announced(work: ModuleType, source: Path, root: Path) -> None:
    recipe = work.stages(source)
    draft = Path(f"{plan(recipe, root)[1].folder}.draft")
    draft.mkdir(parents=True)
    (draft / ".0.txt.partial").write_text("torn")
    assert verdicts(recipe, root)["shards"] == "new (begun: goes on from its draft)"
    manifest = work.go(recipe, root)[1].manifest
    assert manifest.timings.resumed
    assert sorted(manifest.files) == [f"shards/{index}.txt" for index in range(4)]


def test_an_adopted_folder_replaces_its_stage(
    work: ModuleType, source: Path, root: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    (given / "shards").mkdir(parents=True)
    (given / ".cache").mkdir()
    for index in range(4):
        (given / "shards" / f"{index}.txt").write_text("100")
    choice = Choice(adopt={"shards": given})
    recipe = [stage for stage in work.stages(source) if stage.name != "other"]
    assert verdicts(recipe, root, choice) == {
        "source": "unused (only adopted stages would need it)",
        "shards": f"adopted ({given})",
        "train": "new",
    }
    outcomes = work.go(recipe, root, choice)
    assert [outcome.planned.name for outcome in outcomes if outcome.ran] == ["train"]
    manifest = read_manifest(root / "model")
    assert manifest.inputs["shards"].folder == str(given)
    (given / ".cache" / "when").write_text("hidden files do not count")
    assert verdicts(recipe, root, choice)["train"] == "done"
    (given / "shards" / "0.txt").write_text("101")
    assert verdicts(recipe, root, choice)["train"] == "stale (input shards changed)"
    assert [artifact.folder for artifact in ancestors(root / "model")] == [given]
    with pytest.raises(ConfigError, match=r"adopt\.shards: .*gone is no folder"):
        plan(recipe, root, Choice(adopt={"shards": tmp_path / "gone"}))


def test_lineage_answers_both_ways(work: ModuleType, source: Path, root: Path) -> None:
    work.go(work.stages(source), root)

    def names(artifacts: list[object]) -> list[str]:
        return [artifact.name.rpartition("-")[0] for artifact in artifacts]  # type: ignore[attr-defined]

    assert names(ancestors(root / "model")) == ["source", "shards"]
    assert names(descendants(next(root.glob("source-*")))) == ["shards", "other", "train"]
    assert names(descendants(next(root.glob("shards-*")))) == ["train"]
    assert descendants(root / "model") == []
    assert open_artifact(root / "model").manifest == read_manifest(root / "model")
    with pytest.raises(DataError, match="is no folder"):
        open_artifact(root / "gone")


def test_a_vanished_outside_file_is_named(work: ModuleType, source: Path, root: Path) -> None:
    recipe = work.stages(source)
    source.unlink()
    with pytest.raises(RunError, match=r"numbers\.txt does not exist; put it back"):
        plan(recipe, root)


def test_an_input_that_vanishes_in_mid_run_is_named(work: ModuleType, source: Path, root: Path) -> None:
    recipe = work.stages(source)
    running = execute(recipe, root, Runtime(logs=root / "logs"))
    next(running)
    shutil.rmtree(next(root.glob("source-*")))
    with pytest.raises(
        RunError, match=r"input source of stage `shards` has vanished: folder .* is missing; run again"
    ):
        next(running)
    assert len(work.go(recipe, root)) == 4


def test_an_input_that_vanishes_inside_a_stage_is_named(work: ModuleType, source: Path, root: Path) -> None:
    def lose(config: object, inputs: dict[str, Path], out: Path, runtime: Runtime) -> dict[str, int]:
        shutil.rmtree(inputs["source"])
        return {"bytes": (inputs["source"] / "numbers.json").stat().st_size}

    recipe = [work.stages(source)[0], Stage("lose", lose, work.TrainConfig(), {"source": "source"})]
    with pytest.raises(RunError, match=r"input source of stage `lose` has vanished"):
        work.go(recipe, root)


def test_a_source_that_changes_while_it_is_read_is_refused(
    work: ModuleType, source: Path, root: Path
) -> None:
    def meddle(config: object, inputs: dict[str, Path], out: Path, runtime: Runtime) -> dict[str, int]:
        source.write_text("other")
        return {}

    with pytest.raises(RunError, match=r"numbers\.txt changed while stage `meddle` read it"):
        work.go([Stage("meddle", meddle, work.TrainConfig(), outside=(source,))], root)


def test_a_stage_that_fails_says_where_and_goes_on_later(work: ModuleType, source: Path, root: Path) -> None:
    source.write_text("1 2 three")
    with pytest.raises(ValueError, match="three") as caught:
        work.go(work.stages(source), root)
    assert any("in stage `source`; its log: " in note for note in caught.value.__notes__)
    log = next((root / "logs").glob("source-*")) / "stage.log"
    assert "ValueError" in log.read_text()
    source.write_text("1 2 3 4")
    work.go(work.stages(source), root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(config: object, inputs: dict[str, Path], out: Path, runtime: Runtime) -> dict[str, int]:
    with (out / "big.bin").open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(8192))
    return {}


def test_a_full_disk_ends_the_run_with_a_clear_error(work: ModuleType, small_disk: Path) -> None:
    recipe = [Stage("fill", fill, work.TrainConfig())]
    with pytest.raises(
        RunError, match=r"stage `fill`: disk full while writing .*fill-.* bytes free, more needed"
    ):
        work.go(recipe, small_disk / "run")
    assert not [path for path in (small_disk / "run").glob("fill-*") if not path.name.endswith(".draft")]


def test_a_file_size_limit_ends_the_run_with_a_clear_error(work: ModuleType, root: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"disk full while writing .*File too large"):
            work.go([Stage("fill", fill, work.TrainConfig())], root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    work.go([Stage("fill", fill, work.TrainConfig())], root)


def test_stages_that_do_not_fit_together_are_refused(work: ModuleType, source: Path, root: Path) -> None:
    recipe = work.stages(source)
    with pytest.raises(ConfigError, match="two stages are called `train`"):
        plan([*recipe, recipe[-1]], root)
    with pytest.raises(
        ConfigError, match="input shards of stage `train` is `shards`, which is no earlier stage"
    ):
        plan([recipe[-1], *recipe[:-1]], root)


def test_a_folder_in_the_way_of_a_link_is_named(work: ModuleType, source: Path, root: Path) -> None:
    (root / "model").mkdir(parents=True)
    with pytest.raises(RunError, match="model is in the way of the link to train-"):
        work.go(work.stages(source), root)
