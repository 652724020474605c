"""In which type a step computes, and that compiled blocks compute what the written ones do."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pensar.base.errors import ConfigError
from pensar.base.progress import Progress
from pensar.base.ranks import World
from pensar.model import hardware
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.text.packing import Batch
from pensar.train import arithmetic
from pensar.train.arithmetic import Arithmetic, bfloat16_gain, compiled
from pensar.train.layout import parse_layout
from pensar.train.loop import LoopConfig, Place, _arithmetic, fit
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.step import train_step

SPARSE = {"num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 32, "intermediate_size": 0}


def model_of(*, sparse: bool = False, layers: int = 2) -> Qwen3:
    values = {
        "vocab_size": 64,
        "hidden_size": 48,
        "num_layers": layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
    }
    model = Qwen3(ModelConfig(**(values | (SPARSE if sparse else {}))))
    initialize(model, 0)
    return model.train()


def batches(step: int) -> list[Batch]:
    tokens = np.random.default_rng(step).integers(0, 64, (2, 32)).astype(np.int32)
    places = np.tile(np.arange(32, dtype=np.int32), (2, 1))
    segments = np.repeat(np.array([[1, 2]], np.int32), 16, 1).repeat(2, 0)
    return [
        Batch(
            tokens=tokens, positions=places % 16, segments=segments, ce=(places % 16 > 0).astype(np.float32)
        )
    ]


def losses(model: Qwen3, num: int = 4) -> list[float]:
    optimizer = Optimizer(model, OptimizerConfig())
    return [
        train_step(model, optimizer, batches(step), 1.0, World(), LossConfig())["loss"] for step in range(num)
    ]


@pytest.mark.parametrize("sparse", [False, True])
def test_bfloat16_products_stay_near_float32_and_weights_stay_float32(sparse: bool) -> None:
    expected = losses(model_of(sparse=sparse))
    model, in_bfloat16 = model_of(sparse=sparse), Arithmetic("bfloat16", 48, World())
    with in_bfloat16():
        found = losses(model)
    assert found == pytest.approx(expected, abs=0.02)
    assert found != expected
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("gain", "width", "chosen"), [(2.5, 256, "bfloat16"), (1.4, 256, "float32"), (9, 128, "float32")]
)
def test_the_probe_decides_and_narrow_models_stay_in_float32(
    monkeypatch: pytest.MonkeyPatch, gain: float, width: int, chosen: str
) -> None:
    monkeypatch.setattr(arithmetic, "bfloat16_gain", lambda: gain)
    assert Arithmetic("auto", width, World()).precision == chosen
    assert Arithmetic("float32", width, World()).precision == "float32"


def test_the_probe_measures_this_processor() -> None:
    assert 0.0 < bfloat16_gain(128, 1) < math.inf


def test_a_run_goes_on_in_the_type_it_began_with(tmp_path: Path) -> None:
    config = LoopConfig(steps=4, checkpoint_every=2, precision="bfloat16", optimizer=OptimizerConfig())

    def trained(folder: str, config: LoopConfig) -> Qwen3:
        model = model_of()
        place = Place(tmp_path / folder, tmp_path / f"{folder}-logs", World(), Progress())
        fit(model, batches, config, place, name="test")
        return model

    whole = trained("whole", config)

    class Killed(Exception):
        pass

    def dying(step: int) -> list[Batch]:
        if step == 3:
            raise Killed
        return batches(step)

    place = Place(tmp_path / "half", tmp_path / "half-logs", World(), Progress())
    with pytest.raises(Killed):
        fit(model_of(), dying, config, place, name="test")
    other = trained(
        "half", LoopConfig(steps=4, checkpoint_every=2, optimizer=OptimizerConfig())
    )  # auto: float32
    for mine, theirs in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_unknown_type_in_a_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="'float8'"):
        Arithmetic("auto", 8, World()).load_state_dict({"precision": "float8"})


@pytest.mark.parametrize(
    ("layout", "device", "changes", "chosen"),
    [
        ("shard=2", "cpu", {}, "float32"),
        ("shard=2", "cpu", {"precision": "bfloat16"}, "compute capability 0.0"),
        ("shard=2", "cpu", {"precision": "float8"}, "compute capability 0.0"),
        ("shard=2,replicate=2", "cpu", {"compile": True}, "float32"),
        ("tp=2", "cpu", {"compile": True}, "compile=true with tp 2"),
        ("shard=2", "cuda", {}, "bfloat16"),
        ("shard=2", "cuda", {"precision": "float32"}, "float32"),
        ("shard=2", "cuda", {"precision": "float8", "compile": True}, "float8"),
        ("tp=2", "cuda", {"precision": "float8"}, "with tp 2"),
    ],
)
def test_in_a_layout_the_devices_and_the_kinds_of_ranks_decide(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    layout: str,
    device: str,
    changes: dict[str, object],
    chosen: str,
) -> None:
    monkeypatch.setattr(hardware, "capability", lambda place: (9, 0) if place.type == "cuda" else (0, 0))
    mesh = SimpleNamespace(layout=parse_layout(layout), device=torch.device(device))
    place = Place(tmp_path, tmp_path, World(), Progress(), mesh=mesh)  # type: ignore[arg-type]
    config = LoopConfig(steps=1, **changes)  # type: ignore[arg-type]
    if chosen not in ("float32", "bfloat16", "float8"):
        with pytest.raises(ConfigError, match=chosen):
            _arithmetic(model_of(), config, place)
        return
    arithmetic = _arithmetic(model_of(), config, place)
    assert arithmetic.precision == chosen
    with arithmetic():  # shards come in their type already
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("sparse", [False, True])
def test_compiled_blocks_compute_what_written_ones_do(sparse: bool) -> None:
    expected = losses(model_of(sparse=sparse, layers=3))
    torch._dynamo.utils.counters.clear()
    model = model_of(sparse=sparse, layers=3)
    with compiled(model):
        found = losses(model)
    assert found == pytest.approx(expected, abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert "forward" not in vars(model.model.layers[0])
