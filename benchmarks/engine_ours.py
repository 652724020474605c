"""Our engine as a contender: `python -m benchmarks.engine_ours FOLDER SLOTS KIND`, KIND a type of the weights."""

import sys
from pathlib import Path
from typing import cast

import torch

from benchmarks.engine_serve import Generate, serve
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.native.library import available
from pensar.infer.runners import Weights, runner_for
from pensar.infer.step import Runner
from pensar.infer.torch_runner import TorchRunner
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model

POSITIONS = 512
TORCH = "torch float32"
"""The module as it was trained; the other types are those of the native kernels."""


def kinds() -> tuple[str, ...]:
    """The types of weights that the engine can compute with here."""
    return (TORCH, "float32", "int8", "int4") if available() else (TORCH,)


def named(metric: str, kind: str, primary: str) -> str:
    """The line of `primary`, or of the module where there are no kernels, has the metric's plain name."""
    if kind == (primary if available() else TORCH):
        return metric
    return f"{metric}_{kind.replace(' ', '_')}"


def runner_of(model: Qwen3, kind: str) -> Runner:
    """What the engine is made with for a type of weights."""
    if kind == TORCH:
        return TorchRunner(model)
    return runner_for(model, "as_is" if kind == "float32" else cast(Weights, kind))


def generator(folder: str, slots: int, kind: str) -> Generate:
    torch.set_num_threads(1)
    engine = Engine(runner_of(load_model(Path(folder)), kind), slots=slots, max_tokens_per_slot=POSITIONS)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        requests = [Request(str(number), prompt, params) for number, prompt in enumerate(prompts)]
        return [completion.tokens for completion in engine.run(requests)]

    return generate


if __name__ == "__main__":
    serve(generator(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
