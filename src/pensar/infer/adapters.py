"""Adapters: LoRA and DoRA changes of one model, many of them in one batch, loaded and unloaded while it serves.

Shape legend: N tokens of a pass, n those of one adapter, I inputs, O outputs, r rank, E experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pensar.base.errors import ModelError
from pensar.infer.request import Ints
from pensar.model.adapter import load_adapter
from pensar.model.lora import adapted_weights
from pensar.model.qwen3 import Qwen3

PLACES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Modules of each product of a block with fused weights, in the order of its outputs; native kernels count alike (`enum
Place`)."""


@dataclass(frozen=True, slots=True)
class Change:
    """Of one linear layer: y becomes (y + x A^T B^T) gain."""

    a_rI: Tensor
    b_Or: Tensor
    """With the scale alpha / r in it."""
    gain_O: Tensor | None
    """DoRA's length of each row over the length of W + s B A."""

    def add_(self, x_NI: Tensor, y_NO: Tensor, index_n: Tensor) -> None:
        """Changes y where it is, in the rows `index_n` alone."""
        delta_nO = (x_NI[index_n].to(self.a_rI.dtype) @ self.a_rI.mT) @ self.b_Or.mT
        sum_nO = y_NO[index_n] + delta_nO
        y_NO[index_n] = (sum_nO if self.gain_O is None else sum_nO * self.gain_O).to(y_NO.dtype)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one adapter changes, by the names of the model's modules."""

    folder: Path
    linear: Mapping[str, Change]
    experts: Mapping[str, Tensor]
    """Stacked experts as they are with the change in them [E, O, I]; empty unless it changes experts."""


def read_adapter(model: Qwen3, folder: Path) -> Adapter:
    """An adapter in PEFT's format; ModelError, ConfigError or DataError where it is not one of this model."""
    skeleton = _sharing(model)
    load_adapter(skeleton, folder)
    linear: dict[str, Change] = {}
    experts: dict[str, Tensor] = {}
    for name, weight in adapted_weights(skeleton):
        a, b = weight.lora_a.detach(), weight.lora_b.detach()
        if a.ndim == 3:
            experts[name] = weight.whole()
            continue
        gain = None
        if weight.magnitude is not None:
            lengths = torch.linalg.vector_norm(weight.base(a.dtype) + weight.scale * (b @ a), dim=-1)
            gain = (weight.magnitude.detach() / lengths).detach()
        linear[name] = Change(a, b * weight.scale, gain)
    return Adapter(folder, linear, experts)


class Numbered:
    """The loaded adapters by number."""

    def __init__(self) -> None:
        self._loaded: dict[int, Adapter] = {}

    def set(self, number: int, adapter: Adapter | None) -> None:
        """Gives an adapter a number, or takes it away."""
        if adapter is None:
            self._loaded.pop(number, None)
        else:
            self._loaded[number] = adapter

    def alone(self, adapters_R: Ints) -> bool:
        """Whether rows must be computed apart: stacked experts are those of one adapter at a time."""
        return any(self._loaded[number].experts for number in set(adapters_R.tolist()) if number >= 0)

    @staticmethod
    def tokens_of(adapters_R: Ints, counts_R: Ints, device: torch.device) -> dict[int, Tensor]:
        """By number, which tokens of a pass over rows with these adapters are an adapter's."""
        adapter_N = np.repeat(adapters_R, counts_R)
        return {
            number: torch.from_numpy(np.flatnonzero(adapter_N == number)).to(device, non_blocking=True)
            for number in np.unique(adapter_N).tolist()
            if number >= 0
        }


class Adapters(Numbered):
    """The loaded adapters of a module and their part in a pass over rows of several."""

    def __init__(self, model: Qwen3) -> None:
        super().__init__()
        self._model = model
        self._tokens: dict[int, Tensor] = {}
        self._hooked = False

    def set(self, number: int, adapter: Adapter | None) -> None:
        super().set(number, adapter)
        if adapter is not None and not self._hooked:
            for name, module in self._model.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    module.register_forward_hook(self._hook(name))
            self._hooked = True

    @contextmanager
    def over(self, adapters_R: Ints | None, counts_R: Ints, device: torch.device) -> Iterator[None]:
        """Within it the module computes each token by its row's adapter."""
        if adapters_R is None:
            yield
            return
        self._tokens = self.tokens_of(adapters_R, counts_R, device)
        with self._experts(list(self._tokens)):
            try:
                yield
            finally:
                self._tokens = {}

    @contextmanager
    def _experts(self, numbers: list[int]) -> Iterator[None]:
        changed = self._loaded[numbers[0]].experts if len(numbers) == 1 else {}
        own: dict[str, nn.Parameter] = {}
        try:
            for name, values in changed.items():
                owner, _, attribute = name.rpartition(".")
                module = self._model.get_submodule(owner)
                own[name] = getattr(module, attribute)
                setattr(module, attribute, nn.Parameter(values, requires_grad=False))
            yield
        finally:
            for name, parameter in own.items():
                owner, _, attribute = name.rpartition(".")
                setattr(self._model.get_submodule(owner), attribute, parameter)

    def _hook(self, name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._tokens:
                return None
            x_NI, y_NO = inputs[0].flatten(0, -2), output.flatten(0, -2)
            for number, index_n in self._tokens.items():
                if (change := self._loaded[number].linear.get(name)) is not None:
                    change.add_(x_NI, y_NO, index_n)
            return y_NO.view(output.shape)

        return add


def _sharing(model: Qwen3) -> Qwen3:
    """Another module with the same weights, which may be taken apart."""
    with torch.device("meta"):
        other = Qwen3(model.config)
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        setattr(other.get_submodule(owner), attribute, nn.Parameter(parameter.detach(), requires_grad=False))
    return other


def checked_name(name: str, loaded: Mapping[str, int]) -> None:
    """ModelError for a name that cannot be a new adapter's."""
    if not name:
        raise ModelError("an adapter needs a name; requests ask for it by that")
    if name in loaded:
        raise ModelError(f"adapter {name!r} is loaded already; unload it first, or choose another name")
