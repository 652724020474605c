"""`pensar show` of a sweep: what its laws say of a size and a number of tokens."""

import json
from pathlib import Path

import msgspec
import pytest

from pensar.cli import main
from pensar.train.optimizer import OptimizerConfig
from pensar.train.optimum import Optimum
from pensar.train.powerlaw import Interval
from pensar.train.prediction import FILE, Cell, predict_from


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Optima on lr = 2 N^-0.5, and one batch alone."""
    cells = []
    for size in (20_000, 80_000, 320_000):
        for tokens in (50_000, 100_000):
            best = Optimum(
                rate=Interval(2 * size**-0.5), batch=Interval(64.0), loss=3.0, batch_edge="low",
                coefficients=(3.0, 0.0, 0.0), scatter=None, num_points=3, window=(0.01, 0.04),
            )  # fmt: skip
            cells.append(Cell(parameters=size, tokens=tokens, hidden_size=8, points=[], optimum=best))
    prediction = predict_from(cells, 64, OptimizerConfig(lr=0.003, adamw_lr=0.001))
    (tmp_path / FILE).write_bytes(msgspec.json.encode(prediction))
    return tmp_path


def test_values_for_a_size_are_shown_and_missing_laws_explained(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("show", str(sweep), "--parameters", "1e6", "--tokens", "2e5")
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["1M", "parameters,", "200K", "tokens"]
    assert lines[1].split()[:4] == ["learning", "rate,", "Muon", "0.002"]
    assert any(line.startswith("learning rate, AdamW") and "0.000667" in line for line in lines)
    assert any(line.startswith("batch") and "no law: 0 points for 2 coefficients" in line for line in lines)
    assert lines[-1] == "beyond the sweep: 3.1×"
    assert main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prediction"]["rate"]["value"] == pytest.approx(0.002)
    assert document["prediction"]["batch_tokens"] is None


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--parameters", "1e6"), 2, "give both, as in --parameters 4e5 --tokens 1e6"),
        (("--parameters", "0", "--tokens", "5"), 2, "give both"),
    ],
)
def test_half_a_question_is_refused(
    sweep: Path, options: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(sweep), *options]) == code
    assert said in capsys.readouterr().err


def test_a_folder_without_a_sweep_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["show", str(tmp_path), "--parameters", "1e6", "--tokens", "1e6"]) == 1
    assert "holds no prediction.json" in capsys.readouterr().err
