"""Tensor and sequence parallelism: heads, MLP columns and vocabulary split over ranks (arXiv 1909.08053, 2205.05198).

Between the split parts the stream itself is split along the tokens, so that norms and residuals are computed once.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

from pensar.model.moe import SparseMLP
from pensar.model.qwen3 import Block, Qwen3


def split_tensors(model: Qwen3, mesh: DeviceMesh) -> None:
    """Splits the parameters of the model over a one-dimensional mesh; what it computes stays the same."""
    ends: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(),
    }
    parallelize_module(model, mesh, {name: style for name, style in ends.items() if _has(model, name)})
    for block in model.model.layers:
        assert isinstance(block, Block)
        parallelize_module(block, mesh, _block_plan(sparse=isinstance(block.mlp, SparseMLP)))
    if _has(model, "model.norm"):
        model.model.norm.register_forward_hook(_gather_tokens)
        model.logits = _Logits(model, mesh)  # type: ignore[method-assign]


class _Logits:
    """`Qwen3.logits` with the vocabulary's rows split; the scores are whole on every rank."""

    def __init__(self, model: Qwen3, mesh: DeviceMesh) -> None:
        self._model, self._mesh = model, mesh

    def __call__(self, hidden: Tensor) -> Tensor:
        head = self._model.lm_head or self._model.model.embed_tokens
        hidden = DTensor.from_local(hidden, self._mesh, [Replicate()], run_check=False)
        return F.linear(hidden, head.weight).full_tensor()  # type: ignore[attr-defined, no-any-return]


def _block_plan(*, sparse: bool) -> dict[str, ParallelStyle]:
    """One gather of the tokens before each half of the block and one scatter after it.

    A sparse MLP takes the tokens of its rank as they are: its experts are split otherwise.
    """
    tokens, everything = Shard(1), Replicate()
    dense: dict[str, ParallelStyle] = {
        "mlp": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(everything,)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=tokens),
    }
    attention: dict[str, ParallelStyle] = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_layouts=(tokens, None, None, None), desired_input_layouts=(everything, None, None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        # The heads are split, so the gradients of the norms that they share are sums over the ranks.
        "self_attn.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "self_attn.k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "self_attn.o_proj": RowwiseParallel(output_layouts=tokens),
        "post_attention_layernorm": SequenceParallel(use_local_output=sparse),
    }
    return attention if sparse else attention | dense


def _gather_tokens(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    # A copy: what FSDP hooks onto must not be a view.
    return output.full_tensor().clone() if isinstance(output, DTensor) else output


def _has(model: nn.Module, name: str) -> bool:
    part: Any = model
    for step in name.split("."):
        part = getattr(part, step, None)
    return part is not None
