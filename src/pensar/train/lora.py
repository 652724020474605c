"""LoRA in a stage: the model is adapted before its first step, and merged, with its adapter beside it, after the last.

Adapters are AdamW's: Muon orthogonalises the update of a map, and neither factor is one; what they make together is.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pensar.base.errors import ConfigError
from pensar.model.adapter import save_adapter
from pensar.model.lora import adapt, adapted_weights, merged
from pensar.model.qwen3 import Qwen3
from pensar.train.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from pensar.train.loop import LoopConfig

ADAPTER = "adapter"
"""Folder of a model artifact with what its stage changed, in PEFT's format."""


def started(model: Qwen3, config: "LoopConfig", *, seed: int, name: str, in_layout: bool) -> OptimizerConfig:
    """Adapts the model, if it is to be; returns the optimiser's configuration, with AdamW alone for adapters."""
    if config.lora is None:
        return config.optimizer
    if in_layout:
        raise ConfigError(
            f"{name}: lora in a layout of ranks, which spreads plain weights only; leave the layout empty, so that "
            "each rank has the whole model, or leave lora out"
        )
    if config.precision == "float8":
        raise ConfigError(
            f"{name}: lora with precision=float8, whose products are those of plain layers; set precision to auto, or "
            "lora.quantize for frozen weights in few bits"
        )
    adapt(model, config.lora, seed)
    return msgspec.structs.replace(config.optimizer, muon=False)


def finished(model: Qwen3, out: Path) -> Qwen3:
    """The model that the artifact shows; of an adapted one the adapter is written first."""
    if next(adapted_weights(model), None) is None:
        return model
    save_adapter(model, out / ADAPTER)
    return merged(model)
