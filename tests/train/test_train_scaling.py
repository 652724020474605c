"""The sweep: whole runs spread over ranks, gone on with after a kill, grown at a grid's ends, read by pre-training."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from pensar.base.errors import ConfigError, DataError
from pensar.base.ranks import Crew
from pensar.base.stage import Runtime
from pensar.model.attention import Packed
from pensar.model.count import parameters
from pensar.train import scaling
from pensar.train.optimizer import OptimizerConfig
from pensar.train.optimum import Optimum, Point
from pensar.train.powerlaw import Interval
from pensar.train.prediction import (
    FILE,
    Cell,
    Prediction,
    hyperparameters,
    predict_from,
    predicted_batch,
    predicted_rates,
    read_prediction,
)
from pensar.train.pretrain import PretrainConfig, Shape, documents_of_step
from pensar.train.pretrain import run as pretrain
from pensar.train.scaling import RUNS, ScalingConfig, grow, held_out_batches, held_out_loss, run
from tiny import tiny_model, tiny_tokenizer, write_shards


def shape(width: int) -> Shape:
    return Shape(
        hidden_size=width, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=width
    )


SWEEP = ScalingConfig(
    shapes=(shape(16), shape(24)),
    tokens=(512, 1024),
    learning_rates=(0.01, 0.02, 0.04),
    batch_tokens=(32,),
    context=32,
    held_out_rows=8,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    texts = [f"True or false, left to right: {'T and F ' * (n % 7 + 1)}" for n in range(60)]
    documents = [tokenizer.encode(text) for text in texts]
    size = tokenizer.vocab_size
    shards = write_shards(folder / "shards", documents, end=tokenizer.pad_id, vocab_size=size)
    return {"shards": shards, "tokenizer": folder / "tokenizer"}


@pytest.fixture(scope="module")
def swept(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    out.mkdir()
    run(SWEEP, corpus, out, Runtime(logs=out.with_name("logs")))
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_sweep_leaves_one_file_a_run_and_its_prediction(swept: Path) -> None:
    files = content(swept)
    results = [json.loads(text) for name, text in files.items() if name.startswith(RUNS)]
    assert set(files) == {FILE, *(name for name in files if name.startswith(f"{RUNS}/"))}
    found = read_prediction(swept)
    assert sum(len(cell.points) for cell in found.cells) == len(results) >= 12
    assert {cell.tokens for cell in found.cells} == {512, 1024}
    sizes = {cell.parameters for cell in found.cells}
    assert sizes == {parameters(shape(width).model(300)).active_non_embedding for width in (16, 24)}
    for result in results:
        assert 0 < result["loss"] < math.log(480)
        assert result["steps"] == result["trial"]["tokens"] // 32
    best = {
        cell.tokens: min(p.loss for p in cell.points if p.loss)
        for cell in found.cells
        if cell.hidden_size == 24
    }
    assert best[1024] < best[512]


def test_ranks_share_the_runs_and_change_nothing(
    swept: Path, corpus: dict[str, Path], pair: Crew, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    counts = run(SWEEP, corpus, out, Runtime(logs=tmp_path / "logs", crew=pair))
    assert content(out) == content(swept)
    assert counts["runs"] == len(content(out)) - 1
    assert counts["cells"] == 4


def test_a_killed_sweep_goes_on_and_makes_no_run_twice(
    swept: Path, corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fitted: list[str] = []

    def fit(*arguments: Any, **named: Any) -> None:
        fitted.append(named["name"])
        if len(fitted) == 6:
            raise KeyboardInterrupt
        genuine(*arguments, **named)

    genuine = scaling.fit
    monkeypatch.setattr(scaling, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        run(SWEEP, corpus, out, Runtime(logs=tmp_path / "logs"))
    assert len(content(out)) == 5
    run(SWEEP, corpus, out, Runtime(logs=tmp_path / "logs"))
    assert content(out) == content(swept)
    assert [name for name in fitted if fitted.count(name) > 1] == [fitted[5]] * 2


def test_a_run_that_diverges_is_kept_without_a_loss(corpus: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    wild = msgspec.structs.replace(
        SWEEP,
        shapes=(shape(16),),
        tokens=(1024,),
        learning_rates=(0.01, 0.02, 0.04, 1e30),
        optimizer=OptimizerConfig(muon=False),
        rounds=0,
    )
    counts = run(wild, corpus, out, Runtime(logs=tmp_path / "logs"))
    assert counts["diverged"] == 1
    (cell,) = read_prediction(out).cells
    assert [point.loss is None for point in cell.points] == [False, False, False, True]
    assert read_prediction(out).rate is None
    assert "a law takes several" in counts["rate_law"]


def test_the_loss_is_that_of_every_held_out_token_alone(corpus: dict[str, Path]) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer().vocab_size).eval()
    batches = held_out_batches(corpus["shards"], 32, 5)
    losses = []
    for batch in batches:
        assert batch.ce is not None
        for tokens, segments in zip(batch.tokens.tolist(), batch.segments.tolist(), strict=True):
            for segment in dict.fromkeys(segments):
                own = [token for token, of in zip(tokens, segments, strict=True) if of == segment]
                with torch.inference_mode():
                    logits = model.logits(model(torch.tensor([own]), torch.arange(len(own))[None], Packed()))[
                        0
                    ]
                for place in range(1, len(own)):
                    losses.append(-float(logits[place - 1].double().log_softmax(-1)[own[place]]))
    assert held_out_loss(model, batches) == pytest.approx(np.mean(losses), rel=1e-5)


def cell(
    size: int, tokens: int, rate: float, batch: float, loss: float, edges: tuple[str, str] = ("", "")
) -> Cell:
    best = Optimum(
        rate=Interval(rate), batch=Interval(batch), loss=loss, rate_edge=edges[0], batch_edge=edges[1],  # type: ignore[arg-type]
        coefficients=(loss,), scatter=None, num_points=1, window=(rate, rate),
    )  # fmt: skip
    return Cell(
        parameters=size, tokens=tokens, hidden_size=1, points=[Point(rate, batch, loss)], optimum=best
    )


SIZES, TOKENS = (20_000, 80_000, 320_000), (50_000, 100_000, 400_000)


def law_cells() -> list[Cell]:
    return [
        cell(n, d, 1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571, 1.7 + 406 * n**-0.34 + 410 * d**-0.28)
        for n in SIZES
        for d in TOKENS
    ]


def test_cells_on_published_laws_give_these_laws_back() -> None:
    """The exponents of Step Law (arXiv 2503.04715) and of Chinchilla (arXiv 2203.15556), as made-up optima."""
    found = predict_from(law_cells(), 64, OptimizerConfig(lr=0.004, adamw_lr=0.001))
    assert found.rate is not None
    assert found.batch is not None
    assert found.batch_of_size is not None
    assert found.loss is not None
    assert found.rate.exponent("parameters").value == pytest.approx(-0.713)
    assert found.rate.exponent("tokens").value == pytest.approx(0.307)
    assert found.batch.exponent("tokens").value == pytest.approx(0.571)
    assert found.batch_of_size.exponent("parameters").value == pytest.approx(0, abs=1e-9)
    assert found.loss.size_exponent.value == pytest.approx(0.34, abs=0.003)
    assert found.loss.tokens_exponent.value == pytest.approx(0.28, abs=0.003)
    at = hyperparameters(found, 1_000_000, 4_000_000)
    rate = 1.79 * 1e6**-0.713 * 4e6**0.307
    assert at.rate is not None
    assert at.batch_tokens is not None
    assert at.rate.value == pytest.approx(rate)
    assert at.adamw_rate == pytest.approx(rate / 4)
    assert at.batch_tokens.value == pytest.approx(0.58 * 4e6**0.571)
    assert at.beyond == pytest.approx(10)
    assert predicted_batch(found, 64, 1_000_000, 4_000_000) == round(0.58 * 4e6**0.571 / 64) * 64
    taken = predicted_rates(found, OptimizerConfig(momentum=0.9), 1_000_000, 4_000_000)
    assert (taken.lr, taken.adamw_lr, taken.momentum) == (pytest.approx(rate), pytest.approx(rate / 4), 0.9)
    with pytest.raises(ConfigError, match="the sweep was made with Muon, the stage trains with AdamW alone"):
        predicted_rates(found, OptimizerConfig(muon=False), 1_000_000, 4_000_000)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Prediction) == found


def test_bounds_are_named_and_left_out_of_the_laws() -> None:
    cells = law_cells()
    wrong = [
        cell(20_000, 50_000, 9.0, 64, 9.0, ("high", "")),
        cell(80_000, 50_000, cells[3].optimum.rate.value, 9.0, cells[3].optimum.loss, ("", "low")),  # type: ignore[union-attr]
    ]
    found = predict_from([wrong[0], *cells[1:3], wrong[1], *cells[4:]], 64, OptimizerConfig())
    one, other = found.notes
    assert one.startswith("20,000 parameters, 50,000 tokens: the loss falls up to the high end of the grid")
    assert one.endswith("so that the learning rate is at least 9")
    assert other.endswith("low end of the grid, so that the batch is at most 9")
    assert found.rate is not None
    assert found.batch is not None
    assert (found.rate.num_points, found.batch.num_points) == (8, 8)
    assert found.rate.exponent("parameters").value == pytest.approx(-0.713)
    bounds = [cell(n, d, 9.0, 9.0, 2.0, ("low", "high")) for n in SIZES for d in TOKENS]
    nothing = predict_from(bounds, 64, OptimizerConfig())
    assert (nothing.rate, nothing.batch, nothing.loss) == (None, None, None)
    with pytest.raises(ConfigError, match="did not find a law of the learning rate: the optima of 0 cells"):
        predicted_rates(nothing, OptimizerConfig(), 1, 1)
    with pytest.raises(ConfigError, match="did not find a law of the batch: 0 points"):
        predicted_batch(nothing, 64, 1, 1)


def test_a_grid_grows_where_its_best_lies_at_an_end_and_as_far_as_batches_go() -> None:
    config = msgspec.structs.replace(SWEEP, batch_tokens=(32, 64, 128), tokens=(4096,))
    grids = {(0, 4096): ((0.01, 0.02, 0.04), (32, 64, 128))}

    def grown(rate: float, batch: float, *edges: str) -> tuple[tuple[float, ...], tuple[int, ...]]:
        return grow(config, grids, [cell(1, 4096, rate, batch, 1.0, edges)])[0, 4096]  # type: ignore[arg-type]

    assert grown(0.02, 64, "", "") == grids[0, 4096]
    assert grown(0.04, 64, "high", "") == ((0.01, 0.02, 0.04, 0.08), (32, 64, 128))
    assert grown(0.01, 128, "low", "high") == ((0.005, 0.01, 0.02, 0.04), (32, 64, 128, 256))
    # A batch is one row at least.
    assert grown(0.02, 32, "", "low") == grids[0, 4096]
    # The end of the window that is not the grid's has its neighbours already.
    assert grown(0.02, 64, "high", "") == grids[0, 4096]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rates": (0.01, 0.02)}, "learning_rates has 2 values; the fit takes 3 or more"),
        ({"batch_tokens": (32, 64)}, "batch_tokens has 2 values; the fit takes 1 or 3 or more"),
        ({"batch_tokens": (48,)}, "batch_tokens 48 with context 32 and 512 tokens"),
        ({"batch_tokens": (64,)}, "a run at least 16 steps"),
        ({"shapes": ()}, "0 shapes"),
        ({"tokens": (1024, 512)}, "each once, the least first"),
    ],
)
def test_a_grid_that_can_tell_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ScalingConfig(**(msgspec.structs.asdict(SWEEP) | changes))


def test_pre_training_takes_learning_rates_and_batch_from_the_sweep(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    cells = [cell(n, d, 0.5 * n**-0.3 * d**0.02, 0.9 * d**0.571, 2.0) for n in SIZES for d in TOKENS]
    prediction = predict_from(cells, 64, OptimizerConfig(lr=0.004, adamw_lr=0.001))
    folder = tmp_path / "scaling"
    folder.mkdir()
    (folder / FILE).write_bytes(msgspec.json.encode(prediction))
    config = PretrainConfig(
        tokens=2048,
        mixture="general",
        context=32,
        shape=shape(16),
        predicted=("lr", "batch"),
        batch_tokens=32,
    )
    size = parameters(shape(16).model(300)).active_non_embedding
    out = tmp_path / "out"
    out.mkdir()
    counts = pretrain(config, corpus | {"scaling": folder}, out, Runtime(logs=tmp_path / "logs"))
    rate, batch = 0.5 * size**-0.3 * 2048**0.02, round(0.9 * 2048**0.571 / 32) * 32
    assert batch > 32
    chosen = {"lr": pytest.approx(rate), "adamw_lr": pytest.approx(rate / 4), "batch_tokens": batch}
    assert json.loads((out / "hyperparameters.json").read_bytes()) == chosen
    assert {name: counts[name] for name in chosen} == chosen
    assert counts["steps"] == 2048 // batch
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == counts["steps"]
    assert max(row["lr"] for row in rows) == pytest.approx(rate)
    assert {shown.row for shown in documents_of_step(config, corpus["shards"], out, 0)} == set(
        range(batch // 32)
    )
    with pytest.raises(ConfigError, match="takes a `shape` to begin with and a `scaling` input"):
        pretrain(config, corpus, out, Runtime(logs=tmp_path / "logs"))
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"holds no prediction\.json"):
        pretrain(config, corpus | {"scaling": folder}, out, Runtime(logs=tmp_path / "logs"))
