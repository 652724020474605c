"""From a run's folder to the numbers of a report."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from report_run import FUNNEL, LOSSES, SECONDS, STAGES, make_run, results

from pensar.base.errors import DataError
from pensar.base.files import write_jsonl
from pensar.base.manifest import read_manifest, write_manifest
from pensar.report import write, write_report
from pensar.report.collect import collect
from pensar.report.compare import role_of
from pensar.report.contents import Method
from pensar.report.records import thinned


def numbers(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(write(run).with_name("report.json").read_bytes())
    return loaded


def again(run: Path, stage: str, finished: str, **inputs: str) -> Path:
    """A later artifact of a stage, with other inputs where they are given by stage name."""
    old = next(
        folder for folder in run.glob(f"{stage}-*") if folder.is_dir() and len(folder.name) == len(stage) + 13
    )
    folder = old.with_name(f"{stage}-{finished[-1] * 12}")
    shutil.copytree(old, folder)
    manifest = read_manifest(folder)
    entries = {
        role: msgspec.structs.replace(entry, folder=inputs.get(entry.stage, entry.folder))
        for role, entry in manifest.inputs.items()
    }
    timings = msgspec.structs.replace(manifest.timings, finished=finished)
    write_manifest(folder, msgspec.structs.replace(manifest, timings=timings, inputs=entries))
    return folder


def test_report_json_keeps_the_keys_that_others_rely_on(run_folder: Path) -> None:
    report = numbers(run_folder)
    rows = {
        "stages": {"name", "seconds", "tokens", "tokens_per_second", "peak_memory_bytes"},
        "funnel": {"stage", "documents_in", "documents_out", "dropped"},
        "stage_table": {"benchmark", "after_stage", "mode", "score", "low", "high", "n"},
        "budget_curve": {"budget", "accuracy", "low", "high"},
        "rl_against_distillation": {"method", "pass_at_1", "pass_at_k", "k", "cost_flops", "seconds"},
    }
    for key, fields in rows.items():
        assert report[key], key
        assert all(fields <= row.keys() for row in report[key]), key
    assert report["think_follow"]["score"] == 0.993
    assert report["versions"]["torch"] == "2.13.0+cpu"


def test_stages_come_in_the_order_of_the_work_with_their_costs(run_folder: Path) -> None:
    report = numbers(run_folder)
    assert [row["name"] for row in report["stages"]] == list(STAGES)
    assert report["headline"]["seconds"] == pytest.approx(sum(SECONDS.values()))
    trained = {row["name"]: row for row in report["stages"]}["pretrain-general"]
    _, _, steps, tokens = LOSSES["pretrain-general"]
    assert trained["tokens"] == steps * tokens
    assert trained["tokens_per_second"] == pytest.approx(steps * tokens / (0.9 * SECONDS["pretrain-general"]))


def test_the_funnel_accounts_for_every_document(run_folder: Path) -> None:
    rows = numbers(run_folder)["funnel"]
    assert [row["stage"] for row in rows] == list(FUNNEL)
    for row in rows:
        assert row["documents_in"] - row["documents_out"] == sum(row["dropped"].values())


def test_present_and_missing_languages_are_the_whole_table(run_folder: Path) -> None:
    languages = numbers(run_folder)["languages"]
    assert len(languages["present"]) + len(languages["missing"]) == languages["table_size"] == 119
    assert [row["code"] for row in languages["other"]] == ["und"]


def test_what_the_evaluation_wrote_is_passed_on_unchanged(run_folder: Path) -> None:
    report, wrote = numbers(run_folder), results()
    assert report["budget_references"] == wrote["budget_references"]
    for key in ("budget_curve", "long_context", "validation", "conversations", "stage_table"):
        for got, row in zip(report[key], wrote[key], strict=True):
            assert row.items() <= got.items()


def test_the_headline_is_computed_from_the_scores(run_folder: Path) -> None:
    head = numbers(run_folder)["headline"]
    assert head["mode_gap"] == pytest.approx(0.983 - 0.353)
    assert head["rl"]["points"] == pytest.approx(0.987 - 0.243)
    assert head["distillation_gain"] == pytest.approx(0.902 - 0.668)
    assert head["student_distilled"]["samples_ratio"] == pytest.approx(1920 / 7680)
    assert head["student_distilled"]["seconds_ratio"] == pytest.approx(17 / 39)


def test_changes_are_taken_in_the_same_mode(run_folder: Path) -> None:
    table = numbers(run_folder)["stage_table"]
    changes = {(row["benchmark"], row["after_stage"], row["mode"]): row["change"] for row in table}
    assert changes["reasoning", "cold-start", "thinking"] is None
    assert changes["reasoning", "fusion", "non-thinking"] == pytest.approx(0.347 - 0.187)
    assert changes["think_follow", "general-rl", "flags"] == pytest.approx(0.993 - 0.887)


@pytest.mark.parametrize(
    ("method", "stage", "role"),
    [
        ("off-policy distillation", "student", "start"),
        ("+ reinforcement learning", "student-rl", "rl"),
        ("+ on-policy distillation", "student-distilled", "on-policy"),
        ("GRPO", "", "rl"),
        ("distilled", "", "on-policy"),
        ("something else", "student-rl", "rl"),
        ("something else", "another", ""),
    ],
)
def test_a_method_is_known_by_its_words(method: str, stage: str, role: str) -> None:
    assert role_of(Method(method=method, stage=stage, pass_at_1=0.5)) == role


def test_a_draft_counts_as_begun_and_shows_its_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", until="shards")
    draft = run / "pretrain-general-0123456789ab.draft"
    write_jsonl(
        draft / "metrics.jsonl",
        [{"step": 0, "loss": 8.0, "tokens": 64}, {"step": 1, "loss": 7.0, "tokens": 64}],
    )
    with (draft / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lo')
    report = collect(run)
    assert [(one.name, one.steps) for one in report.unfinished] == [("pretrain-general", 2)]
    assert report.training[-1].last["loss"] == 7.0
    assert not report.training[-1].finished


def test_while_a_changed_recipe_runs_the_report_stays_with_the_last_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    newer = again(run, "filter", "2026-05-05T00:00:00.001+00:0a")
    report = collect(run)
    assert newer.name not in {row.folder for row in report.stages}
    assert report.left_out == ["filter"]
    assert report.evaluated
    chosen = collect(run, shown=[newer])
    assert [row.folder for row in chosen.stages] == [newer.name]


def test_before_an_evaluation_the_newest_artifact_decides_what_goes_together(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", until="pretrain-general")
    newer = again(run, "extract", "2026-05-05T00:00:00.001+00:0a")
    report = collect(run)
    assert [row.name for row in report.stages] == ["demo", "sources", "tasks", "extract"]
    assert newer.name in {row.folder for row in report.stages}
    assert set(report.left_out) == {"language", "filter", "dedup", "decontaminate", "annotate", "mixture", "tokenizer",
                                    "shards", "pretrain-general"}  # fmt: skip


def test_a_link_called_report_is_replaced_and_what_it_showed_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", until="demo")
    artifact = next(run.glob("demo-*"))
    (run / "report").symlink_to(artifact.name)
    page = write(run)
    assert page.is_file()
    assert not (run / "report").is_symlink()
    assert not (artifact / "index.html").exists()


def test_a_report_can_be_drawn_elsewhere_and_twice_the_same(run_folder: Path, tmp_path: Path) -> None:
    first = write_report(run_folder, tmp_path / "out").read_bytes()
    assert write_report(run_folder, tmp_path / "out").read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "report.json"]


def test_results_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    path = next(run.glob("evaluate-*")) / "results.json"
    path.write_text('{"stage_table": [{"benchmark": "reasoning"}]}')
    with pytest.raises(
        DataError,
        match=r"results\.json does not hold the evaluation's results .*stage_table.*--from evaluate",
    ):
        collect(run)


def test_a_record_that_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", until="pretrain-general")
    path = next(run.glob("pretrain-general-*")) / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step"\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a row of a record"):
        collect(run)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        write(tmp_path / "absent")


def test_thinning_keeps_the_mean_and_the_number_of_points_in_bounds() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(1000)]
    thin = thinned(points, most=100)
    assert len(thin) == 100
    assert sum(y for _, y in thin) / 100 == pytest.approx(sum(y for _, y in points) / 1000, abs=1e-6)
    assert thinned(points[:7], most=100) == [(x, pytest.approx(y, rel=1e-5)) for x, y in points[:7]]
