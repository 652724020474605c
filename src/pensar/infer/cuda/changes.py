"""Changes: loaded adapters beside fused weights, and what they add to the products of one pass.

Shape legend: N tokens of a pass, n those of one adapter, I inputs, O outputs, r rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pensar.infer.adapters import PLACES, Adapter, Numbered
from pensar.infer.cuda.weights import Matrix
from pensar.infer.request import Ints
from pensar.model.qwen3 import Qwen3

QKV, OUT, GATE_UP, DOWN = range(4)


class Changes(Numbered):
    """The adapters by number, beside a model's fused products."""

    def __init__(self, model: Qwen3) -> None:
        super().__init__()
        self._outputs = {
            name: module.weight.shape[0]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }

    def over(self, adapters_R: Ints, counts_R: Ints, device: torch.device) -> "Changed | None":
        """What changes in a pass over rows with these adapters; None where nothing does."""
        tokens = self.tokens_of(adapters_R, counts_R, device)
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
                if (change := self._loaded[number].linear.get(name)) is not None:
                    change.add_(x_NI, part_NO, index_n)

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
