"""The sections on scaling laws and on experts: there where a run has them, with the numbers of its artifacts."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from report_run import make_run

from pensar.base.errors import DataError
from pensar.base.files import write_jsonl
from pensar.base.manifest import read_manifest, write_manifest
from pensar.report import write
from pensar.report.collect import collect
from pensar.report.contents import ExpertShares
from pensar.report.laws import Curve, Spot, law_chart, rate_chart
from pensar.report.sections.experts import shares_chart
from pensar.train.optimum import Point, optimum
from pensar.train.prediction import FILE, Cell, Prediction, predict_from

SIZES, TOKENS = (20_000, 80_000, 320_000), (50_000, 100_000, 400_000)
RATES, BATCHES = (0.005, 0.01, 0.02, 0.04), (64, 128, 256)


class Muon(msgspec.Struct):
    """What a prediction asks of an optimiser's configuration."""

    lr: float = 0.003
    adamw_lr: float = 0.001
    muon: bool = True


def made_up_cell(size: int, tokens: int) -> Cell:
    """Losses of a bowl around laws of learning rate and batch; the smallest has its best beyond the grid."""
    best = 2.2 * size**-0.6 * tokens**0.1 if (size, tokens) != (20_000, 50_000) else 0.3
    batch = 0.6 * tokens**0.45
    floor = 1.7 + 30 * size**-0.34 + 60 * tokens**-0.4

    def loss(x: float, y: float) -> float:
        wave = 0.001 * math.sin(size + 3 * tokens + 900 * x + y)
        return floor + 0.05 * math.log(x / best) ** 2 + 0.03 * math.log(y / batch) ** 2 + wave

    points = [Point(x, y, loss(x, y)) for x in RATES for y in BATCHES]
    return Cell(parameters=size, tokens=tokens, hidden_size=32, points=points, optimum=optimum(points))


def made_up_prediction() -> Prediction:
    cells = [made_up_cell(size, tokens) for size in SIZES for tokens in TOKENS]
    return predict_from(cells, 64, Muon())  # type: ignore[arg-type]


@pytest.fixture
def swept_run(tmp_path: Path) -> Path:
    """A run with a sweep, whose first stage begins a model of a given shape."""
    run = make_run(tmp_path / "tiny", until="pretrain-general")
    trained = next(run.glob("pretrain-general-*"))
    manifest = read_manifest(trained)
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
             "intermediate_size": 192}  # fmt: skip
    config = {"shape": shape, "tokens": 1_000_000, "mixture": "general", "context": 64}
    write_manifest(trained, msgspec.structs.replace(manifest, config=config))
    folder = run / f"scaling-{'5' * 12}"
    folder.mkdir()
    (folder / FILE).write_bytes(msgspec.json.encode(made_up_prediction()))
    inputs = {role: manifest.inputs[role] for role in ("shards", "tokenizer")}
    write_manifest(
        folder,
        msgspec.structs.replace(
            manifest, stage="scaling", fingerprint="5" * 64, inputs=inputs, config={}, counts={}
        ),
    )
    return run


def numbers(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(write(run).with_name("report.json").read_bytes())
    return loaded


def test_the_sweep_and_what_it_says_of_the_runs_own_model_are_reported(swept_run: Path) -> None:
    found = numbers(swept_run)["scaling"]
    assert msgspec.convert(found["prediction"], Prediction) == made_up_prediction()
    (target,) = found["targets"]
    assert target["stage"] == "pretrain-general"
    # 2 layers of 4 projections, SwiGLU, norms, and the last norm.
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192 + 2 * 64 + 2 * 16
    values = target["values"]
    assert (values["parameters"], values["tokens"]) == (2 * layer + 64, 1_000_000)
    law = made_up_prediction().rate
    assert law is not None
    expected = law.predict({"parameters": 2 * layer + 64, "tokens": 1e6})
    assert values["rate"] == {"value": expected.value, "low": expected.low, "high": expected.high}
    assert values["adamw_rate"] == pytest.approx(expected.value / 3)
    assert values["beyond"] == pytest.approx(2.5)
    assert [step["tokens"] for step in found["ladder"]] == [400_000, 1_600_000, 6_400_000]


def test_the_page_shows_laws_charts_bounds_and_values(swept_run: Path) -> None:
    page = write(swept_run).read_text("utf-8")
    assert '<a href="#scaling">scaling laws</a>' in page
    assert page.index('id="scaling"') < page.index('id="training"')
    section = page[page.index('id="scaling"') : page.index('id="training"')]
    found = made_up_prediction()
    assert found.rate is not None
    exponent = f"{found.rate.exponent('parameters').value:.3f}".replace("-", "\u2212")
    assert f"N^{exponent}" in section
    assert section.count("<svg") == 3 + 4
    assert f"{len(found.notes)} bounds in place of an optimum" in section
    assert "20,000 parameters, 50,000 tokens: the loss falls up to the high end" in section
    assert "pretrain-general" in section
    assert "2.5×" in section


def test_a_run_without_sweep_or_experts_has_no_such_section(run_folder: Path) -> None:
    page = write(run_folder).read_text("utf-8")
    assert 'id="scaling"' not in page
    assert 'id="experts"' not in page
    assert "scaling laws" not in page
    assert numbers(run_folder)["scaling"] is None
    assert numbers(run_folder)["experts"] == []


def test_laws_that_were_not_found_are_said_so(swept_run: Path) -> None:
    cells = [made_up_cell(20_000, 50_000), made_up_cell(80_000, 50_000)]
    nothing = predict_from(cells, 64, Muon())  # type: ignore[arg-type]
    (next(swept_run.glob("scaling-*")) / FILE).write_bytes(msgspec.json.encode(nothing))
    page = write(swept_run).read_text("utf-8")
    assert "No law of the learning rate:" in page
    assert "No law of the loss:" in page
    assert "No law was found, so there are no exponents." in page


def circles(chart: str, class_: str) -> list[tuple[float, float]]:
    found = re.findall(rf'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+" class="{class_}"', chart)
    return [(float(x), float(y)) for x, y in found]


def test_dots_and_rings_of_a_rate_chart_stand_where_the_runs_are() -> None:
    cell = made_up_cell(80_000, 100_000)
    chart = rate_chart([cell])
    dots = circles(chart, "dot thinking")
    assert len(dots) == len(RATES)
    steps = [after[0] - before[0] for before, after in pairwise(dots)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.02), "equal ratios, equal distances"
    ((x, y),) = circles(chart, "ring thinking")
    assert dots[0][0] < x < dots[-1][0]
    # Downwards is more: no run lies visibly below the quadratic's lowest point.
    assert y >= max(place[1] for place in dots) - 3


def test_a_bound_is_a_ring_without_whiskers_and_an_estimate_a_dot_with_them() -> None:
    spots = (Spot(1e4, 0.02, 0.01, 0.04), Spot(1e5, 0.01, 0.001, 0.1, bound=True))
    law = tuple(Spot(x, 2 / x**0.5, 1 / x**0.5, 4 / x**0.5) for x in (1e4, 3e4, 1e5))
    chart = law_chart([Curve("20K", spots, law), Curve("80K", spots[:1])], "title", "tokens")
    assert len(circles(chart, "dot thinking")) == 1
    assert len(circles(chart, "ring thinking")) == 1
    assert chart.count("whisker thinking") == 1
    assert chart.count("area thinking") == 1
    assert "area non-thinking" not in chart
    assert ">80K</text>" in chart


def test_experts_are_shown_layer_by_layer_with_their_balance(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", until="pretrain-general")
    trained = next(run.glob("pretrain-general-*"))
    shares = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
    (trained / "experts.json").write_text(json.dumps({"steps": [90, 100], "shares": shares}))
    rows = [
        {"step": step, "loss": 3.0, "tokens": 64, "expert_overload": 2 - step / 100, "expert_entropy": 0.9,
         "dead_experts": 1}
        for step in range(100)
    ]  # fmt: skip
    write_jsonl(trained / "metrics.jsonl", rows)
    report = collect(run)
    assert report.experts == [ExpertShares(stage="pretrain-general", steps=(90, 100), shares=shares)]
    page = write(run).read_text("utf-8")
    assert '<a href="#experts">experts</a>' in page
    section = page[page.index('id="experts"') : page.index('id="stages"')]
    assert "steps 90 to 99" in section
    assert "Even shares are 25%; the fullest expert after pretrain-general has 50%, 2 times that." in section
    assert "layer 0, expert 0: 50%, 2 times the even share" in section
    # The strip twice, for a desk and for a phone, and a chart of each measure of balance.
    assert section.count("<svg") == 2 + 3


def test_a_box_is_as_full_as_its_expert() -> None:
    own = ExpertShares(stage="s", steps=(0, 1), shares=[[0.5, 0.25, 0.25, 0.0]])
    chart = shares_chart(own, 900)
    opacities = [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', chart)]
    assert opacities == pytest.approx([1.0, 0.53, 0.53, 0.06], abs=0.006)
    assert chart.count('class="share none"') == 1


def test_shares_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", until="pretrain-general")
    (next(run.glob("pretrain-general-*")) / "experts.json").write_text('{"steps": [1, 2]}')
    with pytest.raises(
        DataError, match=r"experts\.json does not hold shares of experts.*--from pretrain-general"
    ):
        collect(run)
