"""Activation checkpointing: the same gradients from less memory, and experts that count once."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pensar.base.ranks import World
from pensar.model.moe import expert_counts, routings
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch, collate
from pensar.text.sample import Sample
from pensar.train.balance import Balance, ExpertUse
from pensar.train.loss import LossConfig, batch_loss, inputs_of
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.recompute import Recompute, recomputed
from pensar.train.step import train_step
from tiny import SPARSE, parameters_of, tiny_model

KINDS = pytest.mark.parametrize("changes", [{}, SPARSE], ids=["dense", "sparse"])
MODES = pytest.mark.parametrize("mode", ["selective", "full"])
CONFIG = LossConfig(z_loss=1e-3, router_z_loss=0.1)


def rows(num: int = 4, length: int = 40, seed: int = 0) -> Batch:
    """Rows of two documents each."""
    rng = np.random.default_rng(seed)

    def sample() -> Sample:
        tokens = rng.integers(0, 300, length // 2).astype(np.int32)
        return Sample(tokens=tokens, ce=np.ones(length // 2, np.float32))

    return collate([[sample(), sample()] for _ in range(num)], length=length)


def gradient(model: Qwen3, batch: Batch) -> torch.Tensor:
    balance = Balance(model.config, batch.num_tokens, World()) if model.config.num_experts else None
    loss, _ = batch_loss(model, batch, (40.0, 1.0, 1.0), CONFIG, balance=balance)
    loss.backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]
    model.zero_grad()
    return found


@KINDS
@MODES
def test_the_gradient_is_the_same_in_every_bit(mode: Recompute, changes: dict[str, Any]) -> None:
    model, batch = tiny_model(**changes, router_balance_weight=0.5), rows()
    expected = gradient(model, batch)
    with recomputed(model, mode):
        assert torch.equal(gradient(model, batch), expected)
    assert torch.equal(gradient(model, batch), expected)
    assert not any("forward" in vars(module) for module in model.modules())


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        out = operation(*arguments, **(named or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.bytes += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


def held(model: Qwen3, mode: Recompute, batch: Batch) -> int:
    """Bytes that wait for the backward pass."""
    with recomputed(model, mode), Held() as count:
        hidden = inputs_of(batch).hidden(model)
        size = count.bytes
        hidden.sum().backward()
    model.zero_grad()
    return size


@KINDS
def test_less_is_held_for_the_backward_pass(changes: dict[str, Any]) -> None:
    model, batch = tiny_model(**changes, num_layers=6), rows(8, 64)
    whole, selective, full = (held(model, mode, batch) for mode in ("none", "selective", "full"))  # type: ignore[arg-type]
    assert full < 0.3 * whole
    assert full < selective < 0.75 * whole


def saved(model: Qwen3, mode: Recompute, batch: Batch) -> int:
    """Bytes of the tensors that autograd itself saves, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with recomputed(model, mode), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs_of(batch).hidden(model)
    return sum(sizes.values())


@KINDS
def test_autograd_saves_little_more_than_the_blocks_inputs(changes: dict[str, Any]) -> None:
    model, batch = tiny_model(**changes, num_layers=6), rows(8, 64)
    assert saved(model, "full", batch) < 0.5 * saved(model, "none", batch)


@MODES
def test_recomputing_a_sparse_layer_counts_its_tokens_once(mode: Recompute) -> None:
    model, batch = tiny_model(**SPARSE, router_balance_weight=0.5), rows()
    with recomputed(model, mode):
        loss = inputs_of(batch).hidden(model).square().mean()
        before = routings(model)
        loss.backward()
        assert all(now is then for now, then in zip(routings(model), before, strict=True))
    assert float(expert_counts(before).sum()) == 2 * 2 * batch.num_tokens


@KINDS
@MODES
def test_steps_end_in_the_same_weights(mode: Recompute, changes: dict[str, Any]) -> None:
    ends, uses = [], []
    for kind in ("none", mode):
        model, use = tiny_model(**changes), ExpertUse(steps=2)
        optimizer = Optimizer(model, OptimizerConfig())
        with recomputed(model, kind):  # type: ignore[arg-type]
            for step in range(2):
                batches = [rows(3, seed=step), rows(2, seed=9 + step)]
                train_step(model, optimizer, batches, 1.0, World(), CONFIG, use=use)
        ends.append(parameters_of(model))
        uses.append(use.state_dict()["counts"])
    assert torch.equal(ends[0], ends[1])
    assert uses == [None, None] if not changes else torch.equal(uses[0], uses[1])


def test_passes_without_gradients_are_as_they_were() -> None:
    model, batch = tiny_model(**SPARSE), rows()
    with torch.no_grad():
        expected = inputs_of(batch).hidden(model)
        with recomputed(model, "full"):
            assert torch.equal(inputs_of(batch).hidden(model), expected)
