"""The frame of the command line: fast help, examples, completion, lazy verbs, and what it prints."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pensar
from pensar.cli import VERBS, main
from pensar.cli.screen import counts_text

HEAVY = ("torch", "numpy", "pyarrow", "tokenizers", "transformers", "yaml", "msgspec", "jinja2")


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    def measure() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pensar", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(measure() for _ in range(5)) < 0.3
    code = (
        "import sys; from pensar.cli import main; main(['--help'])\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_verbs_help_loads_torch() -> None:
    code = (
        "import sys; from pensar.cli import VERBS, main\n"
        "for verb in VERBS: main([verb, '--help'])\n"
        "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_one_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("Example: ") == 1
    assert f"Example: {VERBS[verb].example}" in out
    assert VERBS[verb].summary in out


def test_the_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f" {verb} " in out for verb in VERBS)
    assert "Example:" not in out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == pensar.__version__


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_verbs_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert "until" in out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    for index in range(2000):
        (tmp_path / f"{index:05}.txt").touch()
    command = f"{sys.executable} -m pensar show {tmp_path} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith(str(tmp_path))


def test_a_foreign_folder_is_shown_by_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(tmp_path),
        "manifest": None,
        "files": {"config.json": 2},
    }


def test_the_report_is_shown_as_a_table_or_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "index.html").write_text("<p>")
    row = {"benchmark": "reasoning", "after_stage": "fusion", "mode": "thinking", "score": 0.97, "low": 0.94,
           "high": 0.99, "n": 300}  # fmt: skip
    (folder / "report.json").write_text(json.dumps({"stage_table": [row], "versions": {}}))
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"file://{folder}/index.html" in out
    assert out.splitlines()[-1].split() == [
        "reasoning",
        "fusion",
        "thinking",
        "0.970",
        "0.940",
        "-",
        "0.990",
        "300",
    ]
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stage_table"] == [row]


def test_bench_measures_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pensar.model.config import ModelConfig
    from pensar.model.qwen3 import Qwen3
    from pensar.model.weights import save_model
    from pensar.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some text to learn from, " * 20], vocab_size=300)
    tokenizer.save(tmp_path)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=32, max_positions=256,
    )  # fmt: skip
    save_model(Qwen3(config), tmp_path)
    arguments = [
        "--batch",
        "1",
        "--batch",
        "2",
        "--prompt-tokens",
        "8",
        "--reply-tokens",
        "8",
        "--repeats",
        "1",
    ]
    assert main(["bench", str(tmp_path), *arguments, "--threads", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["batch"] for result in results] == [1, 2]
    assert all(result["prefill_tokens_per_second"] > 0 for result in results)
    assert all(result["decode_tokens_per_second"] >= 0 for result in results)


def test_a_mistyped_verb_is_sent_to_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shw", "data"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "see: pensar --help"
    assert main(["show", "--verfy", "data"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "see: pensar show --help"


@pytest.mark.parametrize(
    ("verb", "goes_on"), [("run", True), ("train", True), ("chat", False), ("serve", False)]
)
def test_only_a_run_goes_on_after_ctrl_c(
    verb: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pensar.cli.build_app", interrupt)
    assert main([verb, "somewhere"]) == 130
    assert ("goes on from here" in capsys.readouterr().err) == goes_on


def test_counts_are_shown_by_their_plain_values() -> None:
    counts = {"kept": 1234, "share": 0.51234, "by": {"a": 1}, "empty": None, "name": "x"}
    assert counts_text(counts) == "kept 1,234, share 0.5123, name x"
