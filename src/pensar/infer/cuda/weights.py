"""Weights: a model's parameters as the kernels read them, its projections fused without a second copy, or in float8.

Shape legend: E experts, D hidden or inputs, O outputs, h head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pensar.base.errors import ConfigError
from pensar.infer.cuda import twins
from pensar.model.moe import SparseMLP
from pensar.model.qwen3 import MLP, Block, Qwen3

Kind = Literal["as_is", "float8"]
ALIGNED = 16
"""What the library's float8 products want sizes to be multiples of."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Of one product, or of one for each expert."""

    weight: Tensor
    """[O, D] or [E, O, D]."""
    scales: Tensor | None = None
    """[O] or [E, O] in float32 where the weight is in float8."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Of one block, gates and ups of its MLP (or of each expert) one after the other."""

    attention_norm: Tensor
    qkv: Matrix
    head_norms_2h: Tensor
    out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix
    router: Tensor | None
    """[E, D] in float32; None in a dense block."""


class Weights:
    """The parameters of a module become parts of fused tensors: who changes them in place changes these.

    What is kept in another form (float8, the router's float32) follows at `refresh`, in place.
    """

    def __init__(self, model: Qwen3, kind: Kind = "as_is") -> None:
        self._model, self._kind = model, kind
        self._copies: list[tuple[Tensor, Matrix]] = []
        self._routers: list[tuple[Tensor, Tensor]] = []
        self._build()

    def refresh(self) -> bool:
        """Takes over changes of the module; True when its parameters have been given other memory meanwhile."""
        if self._addresses != self._addresses_now():
            self._build()
            return True
        self._fill()
        return False

    def bytes(self) -> int:
        """Memory beside the module's."""
        copies = [tensor for _, m in self._copies for tensor in (m.weight, m.scales) if tensor is not None]
        return sum(tensor.nbytes for tensor in (*copies, *(router for _, router in self._routers)))

    def _build(self) -> None:
        self._copies, self._routers = [], []
        backbone = self._model.model
        self.embedding = backbone.embed_tokens.weight.detach()
        head = self._model.lm_head
        self.head = self.embedding if head is None else head.weight.detach()
        self.final_norm = backbone.norm.weight.detach()
        self.layers = [self._layer(block) for block in backbone.layers if isinstance(block, Block)]
        self._addresses = self._addresses_now()
        self._fill()

    def _layer(self, block: Block) -> LayerWeights:
        attention, mlp = block.self_attn, block.mlp
        router = None
        if isinstance(mlp, SparseMLP):
            gate_up, down = mlp.experts.gate_up_proj.detach(), mlp.experts.down_proj.detach()
            router = torch.empty_like(mlp.gate.weight, dtype=torch.float32)
            self._routers.append((mlp.gate.weight.detach(), router))
        else:
            assert isinstance(mlp, MLP)
            gate_up = fuse([mlp.gate_proj.weight, mlp.up_proj.weight])
            down = mlp.down_proj.weight.detach()
        return LayerWeights(
            attention_norm=block.input_layernorm.weight.detach(),
            qkv=self._matrix(
                fuse([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            ),
            head_norms_2h=fuse([attention.q_norm.weight, attention.k_norm.weight]).view(2, -1),
            out=self._matrix(attention.o_proj.weight.detach()),
            mlp_norm=block.post_attention_layernorm.weight.detach(),
            gate_up=self._matrix(gate_up),
            down=self._matrix(down),
            router=router,
        )

    def _matrix(self, weight: Tensor) -> Matrix:
        if self._kind == "as_is":
            return Matrix(weight)
        if weight.shape[-1] % ALIGNED or weight.shape[-2] % ALIGNED:
            raise ConfigError(
                f"weights=float8 needs sizes in multiples of {ALIGNED}, a matrix here is {list(weight.shape[-2:])}; "
                "leave weights at as_is"
            )
        matrix = Matrix(
            torch.empty_like(weight, dtype=torch.float8_e4m3fn),
            torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device),
        )
        self._copies.append((weight, matrix))
        return matrix

    @torch.no_grad()
    def _fill(self) -> None:
        for weight, matrix in self._copies:
            assert matrix.scales is not None
            # One expert at a time: the float32 within is four times what comes out.
            parts = zip(weight, matrix.weight, matrix.scales, strict=True) if weight.dim() == 3 else (
                (weight, matrix.weight, matrix.scales),
            )  # fmt: skip
            for part, into, scales in parts:
                small, scale_O1 = twins.quantize(part)
                into.copy_(small)
                scales.copy_(scale_O1[:, 0])
        for own, router in self._routers:
            router.copy_(own)

    def _addresses_now(self) -> tuple[int, ...]:
        return tuple(parameter.data_ptr() for parameter in self._model.parameters())


def fuse(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows, of which the parameters are parts from now on; what lies so already stays."""
    tensors = [parameter.detach() for parameter in parameters]
    sizes, first = [len(tensor) for tensor in tensors], tensors[0]
    begins = [first.data_ptr()]
    for tensor in tensors:
        begins.append(begins[-1] + tensor.nbytes)
    storage = first.untyped_storage().data_ptr()
    if all(
        tensor.data_ptr() == begin
        and tensor.untyped_storage().data_ptr() == storage
        and tensor.is_contiguous()
        for tensor, begin in zip(tensors, begins, strict=False)
    ):
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    whole = torch.cat(tensors)
    for parameter, part in zip(parameters, whole.split(sizes), strict=True):
        parameter.data = part
    return whole
