"""The verbs on recipes, on a small recipe of pure Python stages in place of the real one."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

import pensar
from pensar.base.config import Config
from pensar.base.config import load as load_config
from pensar.cli import main
from pensar.estimates import StageCost

WORK = Path(__file__).parent.parent / "base"
Call = Callable[..., tuple[int, str, str]]


class SmallRuntime(Config):
    ranks: int = 1
    threads: int = 1
    layout: str = ""
    trackers: tuple[str, ...] = ()
    profile_steps: tuple[int, int] = (0, 0)


class SmallRecipe(Config):
    source: Path
    name: str = "small"
    runtime: SmallRuntime = SmallRuntime()
    lr: float = 0.003
    adopt: dict[str, Path] = msgspec.field(default_factory=dict)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file, and the module that gives its stages."""
    monkeypatch.syspath_prepend(str(WORK))
    import pipeline_work

    module = ModuleType("pensar.recipe")
    given: dict[str, Any] = {
        "load": lambda path, overrides: load_config(path, SmallRecipe, overrides),
        "stages": lambda small: pipeline_work.stages(
            small.source, train=pipeline_work.TrainConfig(lr=small.lr)
        ),
        "estimates": lambda _: {
            "train": StageCost(tokens=1.2e6, flops=3.4e12, memory_bytes=2**21, seconds=75.0),
            "shards": StageCost(seconds=5.0),
        },
        "GROUPS": {"data": ["demo", "source", "shards"], "tokenizer": ["other"], "train": ["train"]},
        "links": lambda _: {"model": "train"},
    }
    for name, value in given.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "pensar.recipe", module)
    monkeypatch.setattr(pensar, "recipe", module, raising=False)
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "numbers.txt"
    source.write_text(" ".join(str(n) for n in range(1, 41)))
    file = tmp_path / "small.yaml"
    file.write_text("source: numbers.txt\n")
    return Path("small.yaml")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run_verb(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_verb


def test_run_prints_each_stage_and_the_next_steps(recipe: Path, call: Call) -> None:
    code, out, _ = call("run", recipe)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "runs/small: stages to do 4, processes 1, threads of each 1"
    assert lines[1].split() == ["stage", "time", "memory", "counts"]
    assert [line.split()[:2] for line in lines[2:6]] == [
        ["ran", "source"], ["ran", "shards"], ["ran", "other"], ["ran", "train"],
    ]  # fmt: skip
    assert lines[3].endswith("numbers 40, shards 4")
    assert lines[-5:] == [
        "next:",
        "  pensar chat runs/small/model",
        "  pensar serve runs/small/model",
        "  pensar report runs/small",
        "  pensar plan small.yaml",
    ]
    _, again, _ = call("run", recipe)
    assert [line.split()[0] for line in again.splitlines()[2:6]] == ["done"] * 4


def test_run_prints_one_json_document(recipe: Path, call: Call) -> None:
    code, out, _ = call("run", recipe, "--json", "--set", "lr=0.5")
    document = json.loads(out)
    assert code == 0
    assert [(stage["name"], stage["status"]) for stage in document["stages"]] == [
        ("source", "ran"), ("shards", "ran"), ("other", "ran"), ("train", "ran"),
    ]  # fmt: skip
    assert document["links"] == {"model": "runs/small/model", "report": "runs/small/report"}
    assert document["stages"][1]["counts"] == {"shards": 4, "numbers": 40}
    assert document["stages"][3]["timings"]["seconds"] >= 0
    manifest = json.loads(Path("runs/small/model/manifest.json").read_text())
    assert manifest["config"] == {"lr": 0.5}


def test_plan_says_why_and_what_it_will_cost(recipe: Path, call: Call) -> None:
    code, out, _ = call("plan", recipe)
    assert code == 0
    assert (
        out.splitlines()[-1]
        == "to do: 4 of 4 stages, 1.20M tokens, 3.40T FLOPs, 2.0 MiB at most, about 1 min 20 s"
    )
    assert not Path("runs").exists(), "planning leaves nothing behind"
    call("run", recipe)
    code, out, _ = call("plan", recipe, "--set", "lr=0.001")
    lines = out.splitlines()
    assert lines[1].split() == ["source", "done"]
    assert lines[4].split() == "train stale 1.20M 3.40T 2.0 MiB 1 min 15 s lr: 0.003 -> 0.001".split()
    _, out, _ = call("plan", recipe, "--json", "--from", "other")
    document = json.loads(out)
    assert [stage["status"] for stage in document["stages"]] == ["done", "done", "stale", "stale"]
    assert document["to_do"] == {
        "stages": 2,
        "tokens": 1.2e6,
        "flops": 3.4e12,
        "memory_bytes": 2**21,
        "seconds": 75.0,
    }
    assert document["stages"][0]["estimate"] is None


def test_groups_run_alone_with_what_they_need(recipe: Path, call: Call) -> None:
    def ran(*arguments: object) -> list[str]:
        _, out, _ = call(*arguments, "--json")
        return [stage["name"] for stage in json.loads(out)["stages"] if stage["status"] == "ran"]

    assert ran("data", recipe) == ["source", "shards"]
    assert ran("tokenizer", recipe) == ["other"]
    assert ran("train", recipe, "--stage", "train") == ["train"]
    code, _, err = call("train", recipe, "--stage", "trian")
    assert code == 2
    assert err == "error: `trian` is no stage of train; did you mean `train`?\n"


def test_until_and_from_are_checked(recipe: Path, call: Call) -> None:
    code, out, _ = call("run", recipe, "--until", "shards", "--json")
    assert [stage["name"] for stage in json.loads(out)["stages"]] == ["source", "shards"]
    code, _, err = call("run", recipe, "--from", "shard")
    assert (code, err) == (2, "error: no stage is called `shard`; did you mean `shards`?\n")


def test_show_tells_lineage_counts_and_files(recipe: Path, call: Call) -> None:
    call("run", recipe, "--set", "lr=0.5")
    code, out, _ = call("show", "runs/small/model", "--verify")
    assert code == 0
    for part in (
        "stage train, revision 1",
        "whole (sizes and digests compared)",
        "lr: 0.5",
        "steps: 12",
        "metrics.jsonl",
    ):
        assert part in out
    assert out.index("source-") < out.index("shards-") < out.index("went into: nothing")
    shards = next(Path("runs/small").glob("shards-*"))
    document = json.loads(call("show", shards, "--json")[1])
    assert [item["stage"] for item in document["ancestors"]] == ["source"]
    assert [item["stage"] for item in document["descendants"]] == ["train"]
    assert document["manifest"]["files"]["shards/0.txt"]["bytes"] > 0
    assert document["damage"] is None
    (shards / "shards" / "0.txt").unlink()
    assert "DAMAGED: file shards/0.txt is missing" in call("show", shards)[1]
    listing = call("show", "runs/small")[1]
    assert [line.split("-")[0] for line in listing.splitlines()[1:]] == ["source", "shards", "other", "train"]


def test_damage_is_reported_before_it_is_mended(recipe: Path, call: Call) -> None:
    call("run", recipe)
    (next(Path("runs/small").glob("shards-*")) / "shards" / "0.txt").unlink()
    _, out, _ = call("run", recipe)
    assert "shards is damaged: file shards/0.txt is missing; it is done anew" in out


def test_adopted_stages_are_named(recipe: Path, call: Call, tmp_path: Path) -> None:
    given = tmp_path / "given" / "shards"
    given.mkdir(parents=True)
    for index in range(4):
        (given / f"{index}.txt").write_text("7")
    code, out, _ = call("run", recipe, "--set", f"adopt.shards={given.parent}")
    assert code == 0
    assert ["adopted", "shards", str(given.parent)] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "gone.yaml"), 2, "error: gone.yaml: no such file"),
        (("plan", "small.yaml", "--set", "lrr=1"), 2, "error: --set lrr=1: unknown key $.lrr; did you mean `lr`?"),
        (("plan", "small.yaml", "--set", "lr=fast"), 2, "error: --set lr=fast: $.lr is 'fast': expected `float`"),
        (("run", "small.yaml", "--ranks", "0"), 2, "error: 0 ranks of 1 threads: both must be at least 1"),
        (("run", "small.yaml", "--set", "source=gone.txt"), 1, "error: gone.txt does not exist; put it back"),
        (("show", "gone"), 1, "error: gone is no folder"),
        (("report", "runs/small"), 1, "error: runs/small holds no artifact"),
        (("eval", "gone"), 1, "error: gone is no folder"),
        (("bench", "gone", "--repeats", "0"), 2, "error: --repeats is 0; give at least 1"),
        (("bench", "gone", "--threads", "-1"), 2, "error: --threads is -1; give at least 1"),
        (("chat", "gone", "--temperature", "inf"), 2, "error: --temperature inf cannot be used; give a finite"),
        (("run",), 2, "error: "),
        (("run", "small.yaml", "--untl", "x"), 2, "error: "),
        (("runn", "small.yaml"), 2, "error: "),
    ],
)  # fmt: skip
def test_wrong_use_is_two_and_failed_work_is_one(
    recipe: Path, call: Call, arguments: tuple[str, ...], code: int, message: str
) -> None:
    returned, out, err = call(*arguments)
    assert returned == code
    assert out == ""
    assert err.startswith(message)
    returned, out, _ = call(*arguments, "--json")
    assert returned == code
    assert json.loads(out)["error"]["message"]


def test_the_report_is_drawn_at_the_end_and_again_when_asked(recipe: Path, call: Call) -> None:
    call("run", recipe, "--until", "shards")
    assert not Path("runs/small/report").exists()
    call("run", recipe)
    page = Path("runs/small/report/index.html")
    assert page.exists()
    page.unlink()
    code, out, _ = call("report", "runs/small")
    assert (code, out.splitlines()[0]) == (0, page.absolute().as_uri())
    assert page.exists()
    assert call("report", "runs/small", "--out", "elsewhere")[0] == 0
    names = [stage["name"] for stage in json.loads(Path("elsewhere/report.json").read_text())["stages"]]
    assert names == ["source", "shards", "other", "train"]


def test_a_failing_stage_names_itself_and_its_log(recipe: Path, call: Call) -> None:
    code, _, err = call("run", recipe, "--set", "adopt.shards=gone")
    assert code == 2
    assert "adopt.shards: gone is no folder" in err
