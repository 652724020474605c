"""Changes: loaded adapters beside fused weights, and what they add to the products of one pass.

Shape legend: N tokens of a pass, n those of one adapter, I inputs, O outputs, r rank.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pensar.infer.adapters import Adapter
from pensar.infer.cuda.weights import Matrix
from pensar.infer.cuda.work import on_device
from pensar.infer.request import Ints
from pensar.model.qwen3 import Qwen3

QKV, OUT, GATE_UP, DOWN = range(4)
PLACES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Modules of each product, in the order of its outputs."""


class Changes:
    """The adapters by number."""

    def __init__(self, model: Qwen3) -> None:
        self._loaded: dict[int, Adapter] = {}
        self._outputs = {
            name: module.weight.shape[0]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }

    def set(self, number: int, adapter: Adapter | None) -> None:
        if adapter is None:
            self._loaded.pop(number, None)
        else:
            self._loaded[number] = adapter

    def alone(self, adapters_R: Ints) -> bool:
        """Whether rows must be computed apart: stacked experts are those of one adapter at a time."""
        return any(self._loaded[number].experts for number in set(adapters_R.tolist()) if number >= 0)

    def over(self, adapters_R: Ints, counts_R: Ints, device: torch.device) -> "Changed | None":
        """What changes in a pass over rows with these adapters; None where nothing does."""
        adapter_N = np.repeat(adapters_R, counts_R)
        tokens = {
            number: on_device(np.flatnonzero(adapter_N == number), device)
            for number in np.unique(adapter_N).tolist()
            if number >= 0
        }
        return Changed(self._loaded, self._outputs, tokens) if tokens else None


class Changed:
    """Which adapter's tokens are where in one pass."""

    def __init__(
        self, loaded: Mapping[int, Adapter], outputs: Mapping[str, int], tokens: Mapping[int, Tensor]
    ) -> None:
        self._loaded, self._outputs, self._tokens = loaded, outputs, tokens

    def add(self, layer: int, place: int, x_NI: Tensor, y_NO: Tensor) -> None:
        """Changes the product of a place, where it is."""
        begin = 0
        for name in (f"model.layers.{layer}.{module}" for module in PLACES[place]):
            part_NO = y_NO[:, begin : begin + self._outputs[name]]
            begin += self._outputs[name]
            for number, index_n in self._tokens.items():
                change = self._loaded[number].linear.get(name)
                if change is None:
                    continue
                delta_nO = (x_NI[index_n].to(change.a_rI.dtype) @ change.a_rI.mT) @ change.b_Or.mT
                sum_nO = part_NO[index_n] + delta_nO
                changed_nO = sum_nO if change.gain_O is None else sum_nO * change.gain_O
                part_NO[index_n] = changed_nO.to(y_NO.dtype)

    def experts(self, layer: int, gate_up: Matrix, down: Matrix) -> tuple[Matrix, Matrix]:
        """A layer's experts, or those that the only adapter of the pass brings instead."""
        if len(self._tokens) != 1:
            return gate_up, down
        theirs = self._loaded[next(iter(self._tokens))].experts
        name = f"model.layers.{layer}.mlp.experts"
        new_gate_up, new_down = (theirs.get(f"{name}.{part}_proj") for part in ("gate_up", "down"))
        return (
            gate_up if new_gate_up is None else Matrix(new_gate_up.detach().contiguous()),
            down if new_down is None else Matrix(new_down.detach().contiguous()),
        )
