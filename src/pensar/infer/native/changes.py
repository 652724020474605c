"""Changes: loaded adapters as the library reads them, one small pair of matrices for each product they change.

The projections of queries, keys and values are one product of the library, and gates and ups another: an adapter's
factors are stacked the same way. Adapters of stacked experts bring experts of their own; their rows are computed apart.
Shape legend: O outputs, I inputs, r rank.
"""

import ctypes
from typing import cast

import torch
from torch import Tensor, nn

from pensar.infer.adapters import PLACES, Adapter
from pensar.infer.native.pack import Matrix, Order, Weights, gate_and_up, in_order
from pensar.infer.native.structs import Change, Layer
from pensar.infer.request import Ints
from pensar.model.moe import Experts


class Changes:
    """The adapters by number; `places` numbers are known to the library, loaded or not."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._loaded: dict[int, Adapter] = {}
        self._apart: dict[int, ctypes.Array[Layer]] = {}
        self._tables: list[ctypes.Array[Change]] = []
        self._kept: dict[int, list[object]] = {}
        self.places = 0

    def set(self, number: int, adapter: Adapter | None) -> None:
        self._loaded.pop(number, None)
        self._apart.pop(number, None)
        self._kept[number] = []
        if number >= self.places:
            self._grow(number + 1)
        for layer in range(len(self._weights.layers)):
            for place in range(len(PLACES)):
                empty = Change() if adapter is None else self._change(number, adapter, layer, place)
                self._tables[layer][number * len(PLACES) + place] = empty
        if adapter is not None:
            self._loaded[number] = adapter
            if adapter.experts:
                self._apart[number] = self._with_experts(number, adapter)

    def alone(self, numbers_R: Ints) -> bool:
        """Whether rows must be computed apart."""
        return any(number in self._apart for number in set(numbers_R.tolist()))

    def layers(self, number: int) -> "ctypes.Array[Layer]":
        """The blocks that compute an adapter's rows."""
        return self._apart.get(number, self._weights.layers)

    def _grow(self, places: int) -> None:
        tables = [(Change * (places * len(PLACES)))() for _ in self._weights.layers]
        for old, new in zip(self._tables, tables, strict=False):
            ctypes.memmove(new, old, ctypes.sizeof(old))
        self._tables, self.places = tables, places
        for blocks in (self._weights.layers, *self._apart.values()):
            for block, table in zip(blocks, tables, strict=True):
                block.changes = table

    def _change(self, number: int, adapter: Adapter, layer: int, place: int) -> Change:
        block = self._weights.model.model.layers[layer]
        names = [name for name in PLACES[place] if _has(block, name)]
        found = {name: adapter.linear.get(f"model.layers.{layer}.{name}") for name in names}
        if not any(found.values()):
            return Change()
        linears = [cast(nn.Linear, block.get_submodule(name)) for name in names]
        outputs = [linear.weight.shape[0] for linear in linears]
        rank = sum(change.a_rI.shape[0] for change in found.values() if change is not None)
        a_rI = torch.cat([change.a_rI for change in found.values() if change is not None])
        b_Or, gain_O = torch.zeros(sum(outputs), rank), torch.ones(sum(outputs))
        top, left = 0, 0
        for (_, change), rows in zip(found.items(), outputs, strict=True):
            if change is not None:
                width = change.a_rI.shape[0]
                b_Or[top : top + rows, left : left + width] = change.b_Or
                left += width
                if change.gain_O is not None:
                    gain_O[top : top + rows] = change.gain_O
            top += rows
        order = gate_and_up(outputs[0]) if place == 2 else in_order(sum(outputs))
        gain = None
        if any(change is not None and change.gain_O is not None for change in found.values()):
            gain = self._keep(number, _ordered(gain_O, order))
        a = self._matrix(number, a_rI, in_order(rank))
        b = self._matrix(number, b_Or, order)
        return Change(a.struct, b.struct, None if gain is None else gain.data_ptr())

    def _matrix(self, number: int, weight_OI: Tensor, order: Order) -> Matrix:
        matrix = Matrix("float32", order, *weight_OI.shape)
        matrix.fill(weight_OI, self._weights.team)
        self._kept[number].append(matrix)
        return matrix

    def _keep(self, number: int, values: Tensor) -> Tensor:
        self._kept[number].append(values)
        return values

    def _with_experts(self, number: int, adapter: Adapter) -> "ctypes.Array[Layer]":
        own = self._weights.layers
        blocks = (Layer * len(own))()
        ctypes.memmove(blocks, own, ctypes.sizeof(own))
        for layer, block in enumerate(blocks):
            name = f"model.layers.{layer}.mlp.experts"
            experts = cast(Experts, self._weights.model.model.layers[layer].get_submodule("mlp.experts"))
            gate_up = adapter.experts.get(f"{name}.gate_up_proj", experts.gate_up_proj)
            down = adapter.experts.get(f"{name}.down_proj", experts.down_proj)
            stacks = self._weights.stacks()
            stacks.fill(gate_up, down)
            block.expert_gate_up, block.expert_down = stacks.pair
            self._kept[number].append(stacks)
        return blocks


def _has(block: torch.nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def _ordered(values_O: Tensor, order: Order) -> Tensor:
    index = torch.from_numpy(order).long()
    return torch.where(index < 0, 1.0, values_O[index.clamp(min=0)]).contiguous()
