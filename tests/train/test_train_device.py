"""A step of training on a pretended CUDA device: nothing lies in the wrong place, and it does what a processor does.

The pretended device computes on the processor; the flash kernel is computed by hand. The model is whole and in float32,
the batch's way to the device and the optimiser are those of a layout of ranks on GPUs.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from parallel_work import batches
from torch import Tensor, nn

from pensar.base.ranks import World
from pensar.model import flash, hardware, moe
from pensar.model.moe import SparseMLP
from pensar.model.qwen3 import Qwen3
from pensar.train import loss as loss_page
from pensar.train import optimizer as optimizer_page
from pensar.train.balance import ExpertUse
from pensar.train.layout import Layout
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig, orthogonalize
from pensar.train.parallel.mesh import Mesh
from pensar.train.parallel.optimizer import ShardedOptimizer
from pensar.train.parallel.run import opened_mesh
from pensar.train.parallel.step import Meshed
from pensar.train.recompute import KEPT, Recompute, recomputed
from pensar.train.step import train_step
from pretend import CUDA, Far, Pretend, flash_by_hand
from tiny import SPARSE, tiny_model

KINDS = pytest.mark.parametrize("changes", [{}, SPARSE, {"tied": False}], ids=["dense", "sparse", "untied"])
LOSS = LossConfig(z_loss=1e-3, router_z_loss=1e-2, chunk_tokens=11)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A layout of one rank."""
    with opened_mesh(World(), Layout()) as opened:
        yield opened


def on(mesh: Mesh, device: torch.device) -> Mesh:
    """The same rank with another device."""
    names = ("layout", "data", "tokens", "stage", "context", "world", "depth", "heads")
    return cast(Mesh, SimpleNamespace(device=device, **{name: getattr(mesh, name) for name in names}))


def moved(model: Qwen3) -> Qwen3:
    """The model with its parameters on the device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(cast(Tensor, parameter.detach().to(CUDA))))
    return model


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """The device, on which flash attention takes float32 so that numbers can be compared closely."""
    plain = loss_page.plain_head

    def plain_head(model: Qwen3) -> Tensor | None:
        head = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
        return head if isinstance(head, Far) else plain(model)

    monkeypatch.setattr(loss_page, "plain_head", plain_head)
    monkeypatch.setattr(flash, "HALF", (torch.float32,))
    monkeypatch.setattr(moe, "_has_kernel", lambda x: True)
    with Pretend() as device, flash_by_hand(device):
        yield device


def steps(
    model: Qwen3,
    mesh: Mesh,
    config: OptimizerConfig,
    *,
    recompute: Recompute = "none",
    num: int = 2,
    micro_batches: int = 2,
) -> list[dict[str, float]]:
    use = ExpertUse(steps=num)
    optimizer = ShardedOptimizer(model, config, mesh)
    with recomputed(model, recompute):
        return [
            train_step(
                model,
                optimizer,
                batches(step, rows=3, micro_batches=micro_batches),
                1.0,
                Meshed(mesh),
                LOSS,
                use=use,
            )
            for step in range(num)
        ]


def values_of(model: Qwen3) -> Tensor:
    return torch.cat([getattr(p.detach(), "near", p.detach()).flatten() for p in model.parameters()])


@KINDS
@pytest.mark.parametrize("muon", [True, False])
def test_a_step_on_the_device_does_what_a_processor_does(
    monkeypatch: pytest.MonkeyPatch, pretend: Pretend, mesh: Mesh, changes: dict[str, Any], muon: bool
) -> None:
    config = OptimizerConfig(muon=muon, weight_decay=0.1)
    here = tiny_model(**changes)
    expected = steps(here, mesh, config)
    monkeypatch.setattr(optimizer_page.hardware, "capability", lambda _: (0, 0))  # Newton-Schulz in float32
    monkeypatch.setattr(flash, "takes_flash", lambda q: q.device.type == "cuda")
    there = moved(tiny_model(**changes))
    found = steps(there, on(mesh, CUDA), config)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(values_of(there), values_of(here), rtol=0, atol=1e-5)
    assert all(isinstance(parameter, Far) for parameter in there.parameters())
    assert pretend.called["torch_attn::_varlen_attn"] >= 2 * 2 * 2  # layers, micro-batches, steps
    assert not pretend.called["aten::_scaled_dot_product_attention_math"]
    assert bool(pretend.called["aten::_grouped_mm"]) == bool(changes.get("num_experts"))


@KINDS
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_blocks_that_compute_again_do_the_same_there(
    pretend: Pretend, mesh: Mesh, changes: dict[str, Any], mode: Recompute
) -> None:
    config = OptimizerConfig(muon=False)
    kept = moved(tiny_model(**changes))
    expected = steps(kept, on(mesh, CUDA), config, micro_batches=1)
    attended, pretend.called["torch_attn::_varlen_attn"] = pretend.called["torch_attn::_varlen_attn"], 0
    again = moved(tiny_model(**changes))
    assert steps(again, on(mesh, CUDA), config, recompute=mode, micro_batches=1) == expected
    assert torch.equal(values_of(again), values_of(kept))
    # The selective form keeps attention's results.
    assert pretend.called["torch_attn::_varlen_attn"] == attended * (2 if mode == "full" else 1)


def test_bfloat16_on_the_device_stays_near_float32(
    pretend: Pretend, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FSDP hands the weights to a block."""
    monkeypatch.setattr(flash, "HALF", (torch.bfloat16,))
    monkeypatch.setattr(moe, "_has_kernel", lambda x: x.dtype == torch.bfloat16)
    config = OptimizerConfig(muon=False, adamw_lr=1e-4)
    expected = steps(tiny_model(**SPARSE), mesh, config)
    found = steps(moved(tiny_model(**SPARSE).bfloat16()), on(mesh, CUDA), config)
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in expected], rel=0.02)
    assert pretend.called["torch_attn::_varlen_attn"]
    assert pretend.called["aten::_grouped_mm"]


def test_counts_and_routing_do_not_wait_for_the_device(pretend: Pretend) -> None:
    """No value of the device is read by the processor in a sparse block."""
    model = moved(tiny_model(**SPARSE))
    block = cast(SparseMLP, model.model.layers[0].mlp)
    pretend.called.clear()
    block(torch.randn(2, 8, 32).to(CUDA)).sum().backward()
    assert not pretend.called["aten::_local_scalar_dense"]
    assert not pretend.called["aten::bincount"]
    assert not pretend.called["aten::nonzero"]
    assert not pretend.called["aten::index_add"]  # whose order of sums a GPU does not fix
    assert not pretend.called["aten::index_put"]
    assert not pretend.called["aten::_index_put_impl_"]


def test_what_selective_recomputation_keeps_has_the_librarys_names() -> None:
    """A name that torch does not know would be computed again without a word."""
    flash.varlen()  # registers its operation
    for name in KEPT - {"flex_attention"}:
        space, _, operation = name.partition("::")
        assert getattr(getattr(torch.ops, space), operation).default.name() == name
    assert torch.ops.higher_order.flex_attention.name() == "flex_attention"


def test_newton_schulz_is_in_bfloat16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 on a processor; either way the singular values end between 0.6 and 1.3, and the vectors stay."""
    matrices = torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(matrices)
    monkeypatch.setattr(hardware, "capability", lambda _: (9, 0))
    rough = orthogonalize(matrices)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).norm() / exact.norm() < 0.06
    singular = torch.linalg.svdvals(rough)
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3


def test_the_pretended_device_finds_what_lies_in_the_wrong_place(pretend: Pretend) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(AssertionError, match="on the processor"):
        x + torch.ones(3)
    with pytest.raises(AssertionError, match="no array"):
        x.numpy()
    assert (x + torch.tensor(1.0)).sum().item() == 6.0
    assert x.cpu().tolist() == [1.0, 1.0, 1.0]
    assert x.to("cuda").device == x.device == CUDA
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(AssertionError, match="processors alone"))
        torch.ops.pensar.causal_attention(*(torch.ones(1, 4, 2, 8, device="cuda") for _ in range(3)))


def test_the_whole_models_optimizer_works_there_too(pretend: Pretend) -> None:
    model = moved(tiny_model())
    optimizer = Optimizer(model, OptimizerConfig())
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    before = values_of(model)
    assert optimizer.step(1.0, World()) > 0
    assert not torch.equal(values_of(model), before)
