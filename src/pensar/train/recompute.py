"""Activation checkpointing: blocks that keep less of their forward pass and compute it again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pensar.model.qwen3 import Qwen3

Recompute = Literal["none", "selective", "full"]
KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_grouped_mm",
        "aten::_scaled_mm",
        "aten::_scaled_grouped_mm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_attention_math",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "torch_attn::_varlen_attn",
        "pensar::causal_attention",
        "pensar::routed_swiglu",
        "flex_attention",
        "_c10d_functional::all_to_all_single",
        "_c10d_functional::reduce_scatter_tensor",
    }
)
"""Operations whose results the selective form keeps: those that cost arithmetic or the network to repeat."""


@contextmanager
def recomputed(model: Qwen3, mode: Recompute) -> Iterator[None]:
    """Within it, every block of the model recomputes: all of itself, or all but products, attention and exchanges.

    Passes without gradients are as they were. A sparse layer's routing stays that of the forward pass, so that what
    counts it counts it once.
    """
    blocks = [] if mode == "none" else list(model.model.layers)
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = partial(_forward, block, block.forward, mode)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block)["forward"] = forward
            if forward is None:
                del vars(block)["forward"]


def _forward(block: nn.Module, forward: Callable[..., Tensor], mode: Recompute, *arguments: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    out: Tensor = checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a block is random
        context_fn=partial(_contexts, block, mode),
    )
    return out


def _contexts(
    block: nn.Module, mode: Recompute
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What the forward pass and its repetition run in."""
    if mode == "full":
        return nullcontext(), _routing_kept(block)
    keeping, replaying = create_selective_checkpoint_contexts(_policy)
    return keeping, _both(_routing_kept(block), replaying)


def _policy(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _routing_kept(block: nn.Module) -> Iterator[None]:
    layers: list[Any] = [module for module in block.modules() if hasattr(module, "routing")]
    before = [layer.routing for layer in layers]
    try:
        yield
    finally:
        for layer, routing in zip(layers, before, strict=True):
            layer.routing = routing


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(first)
        stack.enter_context(second)
        yield
