"""Runners: which one computes a model, chosen by where the model is and what the machine has."""

import logging
from typing import Literal

import torch

from pensar.base.errors import ConfigError, RunError
from pensar.infer.cuda.runner import CudaRunner, unfit
from pensar.infer.native.runner import NativeRunner
from pensar.infer.native.threads import take_fastest
from pensar.infer.step import Runner
from pensar.infer.torch_runner import TorchRunner
from pensar.model.qwen3 import Qwen3

log = logging.getLogger(__name__)

Weights = Literal["as_is", "bfloat16", "int8", "int4", "float8"]
"""`as_is` computes in the model's own type; the others keep the linear layers in fewer bits, float8 on a GPU, the rest
on a CPU."""
NATIVE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What kernels of our own take as it is."""


Cache = Literal["as_is", "bfloat16", "int8"]
"""Type of keys and values in the cache with native kernels; `as_is` is float32 there, the model's type elsewhere."""


def runner_for(
    model: Qwen3,
    weights: Weights = "as_is",
    *,
    cache: Cache = "as_is",
    threads: int | None = 1,
    pin: bool = False,
) -> Runner:
    """Our own kernels on a CPU, where a compiler is there to build them, and on an NVIDIA GPU, where Triton is; torch
    everywhere else.

    `threads` are those of native kernels, None for as many as are fastest here, and with `pin` each stays on its core.
    Raises ConfigError for fewer bits where there is no such kernel.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; give 1 or more, or leave it out for as many as are fastest")
    weight = model.model.embed_tokens.weight
    if weight.device.type == "cuda":
        reason = unfit(model)
        if not reason and weights in ("as_is", "float8") and cache == "as_is":
            return CudaRunner(model, weights)
        reason = reason or f"kernels for {weight.device} keep weights as_is or in float8, and the cache as_is"
    elif weights == "float8":
        reason = f"weights are on {weight.device}, float8 is for a GPU"
    elif weight.device.type == "cpu" and weight.dtype in NATIVE:
        kind = NATIVE[weight.dtype] if weights == "as_is" else weights
        try:
            runner = NativeRunner(
                model,
                kind,  # type: ignore[arg-type]
                cache="float32" if cache == "as_is" else cache,
                threads=threads,
                pin=pin,
            )
            if threads is None:
                take_fastest(runner, pin=pin)
            log.info("computing with %s", runner.describe())
            return runner
        except RunError as error:
            reason = str(error)
    else:
        reason = f"weights are {weight.dtype} on {weight.device}, native kernels take {list(NATIVE)} on a CPU"
    if weights != "as_is" or cache != "as_is":
        raise ConfigError(
            f"weights={weights} with cache={cache} needs native kernels: {reason}; leave both at as_is"
        )
    log.info("computing with torch: %s", reason)
    return TorchRunner(model)
