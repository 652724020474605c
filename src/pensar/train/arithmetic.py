"""How a step computes: in which type, chosen by a probe of the processor, and compiled or as written."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo import config as compiler_config

from pensar.base.errors import ConfigError
from pensar.base.ranks import World
from pensar.model import hardware
from pensar.model.attention import Attend
from pensar.model.moe import SparseMLP
from pensar.model.qwen3 import Qwen3

Precision = Literal["auto", "float32", "bfloat16", "float8"]

WORTH = 1.5
"""How much faster products in bfloat16 must be: what is beside them gains nothing and pays for conversions. Where they
are twice as fast, steps of models 256 wide are 1.9 times so, dense or sparse."""
NARROW = 256
"""Below this hidden size conversions cost what the products gain."""


class Arithmetic:
    """The type of products in forward and backward; weights, gradients and optimiser stay in float32.

    Part of a checkpoint: a run goes on in the type that it began with, whatever a second probe would say. In a layout
    of ranks the device decides, and shards come in their type already.
    """

    def __init__(
        self, precision: Precision, hidden_size: int, world: World, device: torch.device | None = None
    ) -> None:
        """`device` is that of a layout of ranks; None where every rank has the whole model, on its processor."""
        self._shards = device is not None
        if device is not None:
            self.precision = shard_precision(precision, device)
            return
        if precision == "float8":
            raise ConfigError(
                "precision=float8 and the model is on the processor, which multiplies no 8-bit numbers; give "
                "the run a layout on a GPU (runtime.layout: shard=1) or leave precision at auto"
            )
        fast = precision == "bfloat16"
        if precision == "auto":
            mine = hidden_size >= NARROW and bfloat16_gain() >= WORTH
            fast = all(world.gather(mine))
        self.precision = "bfloat16" if fast else "float32"

    def __call__(self) -> AbstractContextManager[Any]:
        """What a step runs in."""
        cast = self.precision == "bfloat16" and not self._shards
        return torch.autocast("cpu", torch.bfloat16) if cast else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {"precision": self.precision}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = ("float32", "bfloat16", "float8") if self._shards else ("float32", "bfloat16")
        if state["precision"] not in known:
            raise ConfigError(
                f"the checkpoint's precision is {state['precision']!r}; begin the stage anew with float32 or bfloat16"
            )
        if not self._shards:
            self.precision = state["precision"]


def shard_precision(precision: Precision, device: torch.device) -> str:
    """The type of products in a layout of ranks on such devices: bfloat16 where they have it and float32 is not asked
    for, float32 elsewhere, float8 on request."""
    able = hardware.capability(device)
    if precision == "float8" and able < hardware.ADA:
        raise ConfigError(
            f"precision=float8 on {device.type}, compute capability {able[0]}.{able[1]}; 8-bit products begin "
            "with 8.9 (Ada, Hopper): leave precision at auto"
        )
    if precision == "bfloat16" and able < hardware.AMPERE:
        raise ConfigError(
            f"precision=bfloat16 in a layout of ranks on {device.type}, compute capability {able[0]}.{able[1]}; there "
            "it begins with GPUs of 8.0: leave precision at auto"
        )
    if precision == "auto":
        return "bfloat16" if able >= hardware.AMPERE else "float32"
    return precision


def bfloat16_gain(size: int = 512, repeats: int = 3) -> float:
    """Time of a float32 product over that of a bfloat16 one on this CPU, converting included: 0.02 to 5."""
    x, y = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))

    def seconds(product: Callable[[], Tensor]) -> float:
        product()
        spent = []
        for _ in range(repeats):
            start = time.perf_counter()
            product()
            spent.append(time.perf_counter() - start)
        return min(spent)

    return seconds(lambda: x @ y) / seconds(lambda: x.bfloat16() @ y.bfloat16())


@contextmanager
def compiled(model: Qwen3, on: bool = True) -> Iterator[None]:
    """Within it the model's blocks are compiled, all by one compilation, but for attention and experts' products.

    The first step takes half a minute longer. Attention's pieces differ from batch to batch, and experts' from token
    to token; both stay calls. Attention, recomputation and shards may be set around or within it.
    """
    blocks = list(model.model.layers) if on else []
    call = torch.compiler.disable(_call) if on else _call
    experts = [block.mlp.experts for block in blocks if isinstance(block.mlp, SparseMLP)]
    for layer in experts:
        for name in ("forward", "routed"):
            if hasattr(layer, name):
                vars(layer)[name] = torch.compiler.disable(getattr(layer, name))
    for block in blocks:
        vars(block)["forward"] = partial(_calling, torch.compile(block.forward, dynamic=False), call)
    try:
        # The number of a layer would otherwise be a constant, and each layer a compilation.
        with compiler_config.patch(allow_unspec_int_on_nn_module=True) if on else nullcontext():
            yield
    finally:
        for module in (*blocks, *experts):
            del vars(module)["forward"]
            vars(module).pop("routed", None)


class _Called:
    """An attention that compilers do not look into."""

    def __init__(self, attend: Attend, call: Callable[..., Tensor]) -> None:
        self.attend, self.call = attend, call

    def __call__(self, layer: int, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        return self.call(self.attend, layer, q_BTHh, k_BTKh, v_BTKh)


def _call(attend: Attend, layer: int, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
    return attend(layer, q_BTHh, k_BTKh, v_BTKh)


def _calling(
    forward: Callable[..., Tensor],
    call: Callable[..., Tensor],
    x_BTD: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
) -> Tensor:
    return forward(x_BTD, cos, sin, _Called(attend, call))
