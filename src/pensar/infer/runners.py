"""Runners: which one computes a model, chosen by where the model is and what the machine has."""

import logging
from typing import Literal

import torch

from pensar.base.errors import ConfigError, RunError
from pensar.infer.native.runner import NativeRunner
from pensar.infer.step import Runner
from pensar.infer.torch_runner import TorchRunner
from pensar.model.qwen3 import Qwen3

log = logging.getLogger(__name__)

Weights = Literal["as_is", "bfloat16", "int8", "int4"]
"""`as_is` computes in the model's own type; the others keep the linear layers in fewer bits."""
NATIVE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What kernels of our own take as it is."""


def runner_for(model: Qwen3, weights: Weights = "as_is", *, threads: int | None = None) -> Runner:
    """On a CPU our own kernels, where a compiler is there to build them; torch everywhere else.

    Raises ConfigError for fewer bits where there is no such kernel.
    """
    weight = model.model.embed_tokens.weight
    if weight.device.type == "cpu" and weight.dtype in NATIVE:
        kind = NATIVE[weight.dtype] if weights == "as_is" else weights
        try:
            return NativeRunner(model, kind, threads=threads)  # type: ignore[arg-type]
        except RunError as error:
            reason = str(error)
    else:
        reason = f"weights are {weight.dtype} on {weight.device}, native kernels take {list(NATIVE)} on a CPU"
    if weights != "as_is":
        raise ConfigError(f"weights={weights} needs native kernels: {reason}; leave weights at as_is")
    log.info("computing with torch: %s", reason)
    return TorchRunner(model)
