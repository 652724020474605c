"""Float8 products: quantised as the formats say, gradients of what is computed, and training that follows float32."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from parallel_work import batches
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from pensar.base.errors import ConfigError
from pensar.base.ranks import World
from pensar.model import hardware
from pensar.model.qwen3 import Qwen3
from pensar.train import float8 as page
from pensar.train.arithmetic import Arithmetic, compiled, shard_precision
from pensar.train.float8 import E4M3, E5M2, float8, float8_linear, linears, quantize
from pensar.train.layout import parse_layout
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.parallel.optimizer import ShardedOptimizer
from pensar.train.parallel.run import opened_mesh, spread_model
from pensar.train.parallel.shard import from_tensors
from pensar.train.parallel.step import Meshed
from pensar.train.recompute import recomputed
from pensar.train.step import train_step
from tiny import SPARSE, tiny_model

WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "initializer_range": 0.05}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, mantissa: int, least_exponent: int, largest: float) -> Tensor:
    """The nearest numbers of a format by its definition: so many bits behind the point, even at a tie, no infinities.

    Subnormal numbers have the spacing of the least exponent.
    """
    exponent = torch.floor(torch.log2(x.abs().double().clamp(min=2.0**-60))).clamp(min=least_exponent)
    spacing = 2.0 ** (exponent - mantissa)
    return ((x.double() / spacing).round() * spacing).clamp(-largest, largest)


def through_float8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantised and back in float64, one scale a tensor; e4m3 ends at 448 and e5m2 at 57,344 (arXiv 2209.05433)."""
    mantissa, least, largest = (3, -6, 448.0) if dtype == E4M3 else (2, -14, 57344.0)
    scale = x.abs().max().double() / largest
    return rounded(x.double() / scale, mantissa, least, largest) * scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_quantising_gives_the_nearest_numbers_of_the_format(dtype: torch.dtype, size: float) -> None:
    x = random(64, 48) * size
    found, scale = quantize(x, dtype)
    assert (found.dtype, scale.dtype) == (dtype, torch.float32)
    expected = through_float8(x, dtype)
    # Where the scale's own rounding moves a value over a tie, the neighbour is as near.
    step = expected.abs() * (2.0**-3 if dtype == E4M3 else 2.0**-2) + 1e-7 * size
    difference = (found.double() * scale.double() - expected).abs()
    assert (difference <= step).all()
    assert (difference > 1e-5 * size).double().mean() < 0.01
    assert float((found.double() * scale.double()).abs().max()) == pytest.approx(
        float(x.abs().max()), rel=1e-6
    )


def test_zeros_stay_zeros() -> None:
    found, scale = quantize(torch.zeros(16, 16), E4M3)
    assert not found.float().any()
    assert scale > 0


@pytest.mark.parametrize("shape", [(5, 16), (3, 7, 64), (1, 32)])
def test_output_and_gradients_are_those_of_quantised_tensors(shape: tuple[int, ...]) -> None:
    """Against products in float64 of tensors that were quantised by definition."""
    x, weight = random(*shape).requires_grad_(), random(48, shape[-1], seed=1).requires_grad_()
    out = float8_linear(x, weight)
    grad = random(*out.shape, seed=2)
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), grad)
    x8, weight8 = through_float8(x.detach(), E4M3), through_float8(weight.detach(), E4M3)
    grad8 = through_float8(grad, E5M2)
    close = {"atol": 2e-2, "rtol": 2e-2}  # a few values lie at ties
    torch.testing.assert_close(out.double(), F.linear(x8, weight8), **close)
    torch.testing.assert_close(grad_x.double(), grad8 @ weight8, **close)
    torch.testing.assert_close(grad_weight.double(), grad8.flatten(0, -2).T @ x8.flatten(0, -2), **close)
    error = (out - F.linear(x, weight)).norm() / F.linear(x, weight).norm()
    assert error < 2**-4  # half a step of e4m3 on either side


def test_results_have_the_types_of_what_goes_in() -> None:
    x, weight = random(16, 32).bfloat16().requires_grad_(), random(48, 32).bfloat16().requires_grad_()
    out = float8_linear(x, weight)
    gradients = torch.autograd.grad(out.sum(), (x, weight))
    assert {out.dtype, *(gradient.dtype for gradient in gradients)} == {torch.bfloat16}


def test_cuda_takes_the_layouts_and_sizes_of_all_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's own checks for CUDA: rows against columns, multiples of 16; here with 37 tokens."""
    sides: list[tuple[Tensor, Tensor]] = []
    real = page._product

    def watched(
        left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, *rest: Any, **named: Any
    ) -> Any:
        sides.append((left, right))
        return real(left, left_scale, right, right_scale, *rest, **named)

    monkeypatch.setattr(page, "_product", watched)
    x, weight = (random(num, 64).bfloat16().requires_grad_() for num in (37, 48))
    float8_linear(x, weight).sum().backward()
    assert [(left.shape[0], left.shape[1], right.shape[0]) for left, right in sides] == [
        (37, 64, 48),
        (37, 48, 64),
        (48, 48, 64),  # 37 tokens and 11 of padding
    ]
    assert [(left.dtype, right.dtype) for left, right in sides] == [(E4M3, E4M3), (E5M2, E4M3), (E5M2, E4M3)]
    narrow, turned = [side[:, :40] for side in sides[0]], [sides[1][0].t()] * 2
    with FakeTensorMode():

        def checked(left: Tensor, right: Tensor) -> torch.Size:
            on_cuda = [
                torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device="cuda") for y in (left, right)
            ]
            scale = torch.empty((), device="cuda")
            return real(on_cuda[0], scale, on_cuda[1], scale, torch.bfloat16, fast=False).shape

        assert [tuple(checked(*pair)) for pair in sides] == [(37, 48), (37, 64), (48, 64)]
        with pytest.raises(RuntimeError, match="16"):
            checked(*narrow)
        with pytest.raises(RuntimeError, match="row"):
            checked(*turned)


def test_only_linear_layers_of_blocks_with_fitting_sizes_are_taken() -> None:
    dense = tiny_model(**WIDE)
    names = {name for name, module in dense.named_modules() if module in linears(dense)}
    projections = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert names == {f"model.layers.{layer}.{name}" for layer in range(2) for name in projections}
    sparse = tiny_model(**(WIDE | SPARSE | {"num_experts": 16}))
    assert len(linears(sparse)) == 2 * 4
    narrow = tiny_model(**(WIDE | {"intermediate_size": 40}))
    assert len(linears(narrow)) == 2 * 4
    with float8(dense):
        assert all("forward" in vars(layer) for layer in linears(dense))
    assert not any("forward" in vars(module) for module in dense.modules())


def losses(model: Qwen3, steps: int) -> list[float]:
    optimizer = Optimizer(model, OptimizerConfig(lr=0.005, adamw_lr=0.003))
    return [
        train_step(model, optimizer, batches(step % 5, rows=4, width=32), 1.0, World(), LossConfig())["loss"]
        for step in range(steps)
    ]


@pytest.mark.parametrize("changes", [WIDE, WIDE | SPARSE], ids=["dense", "sparse"])
def test_fifty_steps_follow_float32(changes: dict[str, Any]) -> None:
    expected = losses(tiny_model(**changes), 50)
    model = tiny_model(**changes)
    with float8(model):
        found = losses(model, 50)
    assert expected[-1] < 0.5 * expected[0]  # something was learnt
    assert found[-1] == pytest.approx(expected[-1], rel=0.04)
    assert found != expected
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_nothing(mode: Any) -> None:
    ends = []
    for kind in ("none", mode):
        model = tiny_model(**WIDE)
        with float8(model), recomputed(model, kind):
            ends.append(losses(model, 3))
    assert ends[0] == ends[1]


def sharded(changes: dict[str, Any], *, on: bool, compile_: bool = False) -> list[float]:
    """Three steps on one rank whose weights FSDP holds: the path of one GPU, on a processor."""
    whole = tiny_model(**changes)
    with opened_mesh(World(), parse_layout("shard=1")) as mesh, ExitStack() as stack:
        model = spread_model(whole.config, mesh, from_tensors(whole.state_dict()))
        optimizer = ShardedOptimizer(model, OptimizerConfig(), mesh)
        stack.enter_context(float8(model, on))
        stack.enter_context(compiled(model, compile_))
        return [
            train_step(model, optimizer, batches(step, rows=4), 1.0, Meshed(mesh), LossConfig())["loss"]
            for step in range(3)
        ]


def test_shards_multiply_in_float8_as_whole_weights_do() -> None:
    whole, optimizer = tiny_model(**WIDE), OptimizerConfig()
    with float8(whole):
        state = Optimizer(whole, optimizer)
        expected = [
            train_step(whole, state, batches(step, rows=4), 1.0, World(), LossConfig())["loss"]
            for step in range(3)
        ]
    assert sharded(WIDE, on=True) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # the compiler's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("changes", [WIDE, WIDE | SPARSE], ids=["dense", "sparse"])
def test_compiled_blocks_of_shards_compute_what_written_ones_do(changes: dict[str, Any], on: bool) -> None:
    """Float8 rounds what compilation changes in the last bit, so it agrees less closely."""
    expected = sharded(changes, on=on)
    torch._dynamo.utils.counters.clear()
    assert sharded(changes, on=on, compile_=True) == pytest.approx(expected, rel=2e-3 if on else 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_processors_and_old_gpus_refuse_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"float8 .*runtime.layout: shard=1"):
        Arithmetic("float8", 64, World())
    with pytest.raises(ConfigError, match=r"float8 on cpu, compute capability 0.0"):
        Arithmetic("float8", 64, World(), torch.device("cpu"))
    monkeypatch.setattr(hardware, "capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match=r"compute capability 8.0; 8-bit products begin with 8.9"):
        shard_precision("float8", torch.device("cuda"))
    assert shard_precision("auto", torch.device("cuda")) == "bfloat16"
    assert shard_precision("float32", torch.device("cuda")) == "float32"
    monkeypatch.setattr(hardware, "capability", lambda _: (9, 0))
    arithmetic = Arithmetic("float8", 64, World(), torch.device("cuda"))
    assert arithmetic.precision == "float8"
    arithmetic.load_state_dict({"precision": "bfloat16"})
    assert arithmetic.precision == "float8"  # in a layout the recipe and the device decide


def test_a_layer_of_another_kind_keeps_its_own_product() -> None:
    class Other(nn.Linear):
        pass

    model = tiny_model(**WIDE)
    mlp: Any = model.model.layers[0].mlp
    mlp.up_proj = Other(64, 96, bias=False)
    assert mlp.up_proj not in linears(model)
