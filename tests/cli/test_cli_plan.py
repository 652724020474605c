"""`pensar plan SIZE`: what it prints, what machines read, and what it refuses."""

import json

import pytest

from pensar.cli import main

ARGUMENTS = ("plan", "30b-a3b", "--gpus", "64", "--gpu", "h200", "--tokens", "1e12")


def test_a_size_is_planned_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARGUMENTS) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines() if line}
    assert out.startswith("30b-a3b on 64 h200 (8 nodes), 1T tokens\n")
    assert "30,532,122,624" in lines["parameters"]
    assert "3,353,032,704" in lines["parameters"]
    assert "1,024 rows of 4,096 tokens, 238,419 steps" in lines["batch"]
    assert any(line.startswith("layout      shard=") for line in out.splitlines())
    for what in ("step", "speed", "time", "energy", "cost", "together", "all-gather of weights", "assumed"):
        assert what in lines
    assert "(--mfu)" in lines["assumed"]


def test_a_size_is_planned_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--context",
        "8192",
        "--batch-tokens",
        "2097152",
        "--mfu",
        "0.3",
        "--price",
        "4",
        "--pue",
        "1.1",
    )
    assert main([*ARGUMENTS, *options, "--muon", "--running-balance", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parameters"]["active"] == 3_353_032_704
    assert document["cluster"]["context"] == 8192
    assert document["cluster"]["muon"] is True
    assert document["cluster"]["exact_balance"] is False
    best = document["plan"]
    parts = best["memory_bytes"]
    assert parts["total"] == pytest.approx(sum(size for name, size in parts.items() if name != "total"))
    assert best["step_seconds"]["total"] > best["step_seconds"]["compute"] > 0
    spent = best["cost"]
    assert spent["dollars"] == pytest.approx(4 * spent["gpu_hours"])
    assert spent["kwh"] == pytest.approx(spent["gpu_hours"] * 0.7 * 1.4 * 1.1)
    assert spent["mfu"] < 0.3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("plan", "30b-a3", "--gpus", "64"),
            "model size '30b-a3' is not in the table; did you mean `30b-a3b`?",
        ),
        (("plan", "8b"), "lacks --gpus, --gpu, --tokens"),
        (("plan", "8b", "--gpus", "8", "--gpu", "h10", "--tokens", "1e9"), "valid: a100-80g, b200, h100"),
        (("plan", "8b", "--gpus", "0", "--gpu", "h100", "--tokens", "1e9"), "gpus is 0; give 1 or more"),
        (
            ("plan", "8b", "--gpus", "1", "--gpu", "rtx4090", "--tokens", "1e9"),
            "are the fewest that would do",
        ),
        (("plan", "8b", "--set", "seed=1"), "are for a recipe"),
        (("plan", "missing.yaml", "--gpus", "8"), "--gpus with the recipe missing.yaml: they are for a size"),
        (("plan", "missing.yaml"), "missing.yaml: no such file"),
        (("plan", "recipes/missing"), "recipes/missing: no such file"),
    ],
)
def test_what_cannot_be_planned_says_why(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_help_shows_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert "pensar plan 30b-a3b --gpus 64 --gpu h200 --tokens 1e12" in capsys.readouterr().out
