"""Weights as the library reads them: one packed matrix, and all of a model's.

Shape legend: O outputs, I inputs, C columns in panels.
"""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pensar.infer.native.library import library
from pensar.infer.native.structs import Layer, Linear
from pensar.model.moe import SparseMLP
from pensar.model.qwen3 import Block, Qwen3

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
Order = npt.NDArray[np.int32]
PIECE = 64 << 20
"""Bytes that a room asks the system for at once; memory is taken only where something is written."""


class Team:
    """Threads of the library, each on a core of its own with `pin` (Linux)."""

    def __init__(self, threads: int, pin: bool = False) -> None:
        self.threads = threads
        self.handle = library().pensar_team(threads, pin)

    def __del__(self) -> None:
        library().pensar_dismiss(self.handle)


def aligned(num_bytes: int) -> Tensor:
    """Bytes that begin at a cache line."""
    return torch.empty(max(num_bytes, 64), dtype=torch.uint8)


class Matrix:
    """One packed matrix, filled from weights [O, I] as often as they change, always in the same place."""

    def __init__(
        self, kind: str, order: Order, outputs: int, inputs: int, take: Callable[[int], Tensor] = aligned
    ) -> None:
        """`take` gives memory that begins at a cache line, by default some of the matrix's own."""
        panel = library().pensar_panel_bytes(KINDS[kind], inputs)
        panels = len(order) // library().pensar_columns()
        self.order = order
        self.data = take(panels * panel)
        self.struct = Linear(KINDS[kind], outputs, inputs, panels, self.data.data_ptr())

    def fill(self, weight_OI: Tensor, team: Team) -> None:
        values = weight_OI.detach().to("cpu", torch.float32).contiguous()
        s = self.struct
        library().pensar_pack(
            s.kind, values.data_ptr(), s.inputs, self.order.ctypes.data, s.panels, s.data, team.handle
        )

    def columns(self, numbers: Sequence[int]) -> Tensor:
        """Columns as floats, with what packing lost."""
        chosen = np.asarray(numbers, np.int64)
        out = torch.empty(len(chosen), self.struct.inputs)
        library().pensar_unpack(ctypes.byref(self.struct), chosen.ctypes.data, len(chosen), out.data_ptr())
        return out

    def product(self, x_NI: Tensor, team: Team) -> Tensor:
        """x W^T [N, O] in the library's order of sums."""
        x_NI = x_NI.float().contiguous()
        out = torch.empty(len(x_NI), self.struct.outputs)
        library().pensar_linear(
            ctypes.byref(self.struct), x_NI.data_ptr(), len(x_NI), out.data_ptr(), team.handle
        )
        return out


def zeros(num_bytes: int) -> Tensor:
    """Zero bytes that begin at a cache line and take memory only where they are written to."""
    room = np.zeros(num_bytes + 64, np.uint8)
    first = -room.ctypes.data % 64
    return torch.from_numpy(room[first : first + num_bytes])


class Room:
    """Memory for many matrices, one behind the other in large pieces. A piece is freed when all within it are and
    the next has been begun.

    The pieces come from numpy, which asks for the system's large pages (Linux, 4 MiB and more). A single row's product
    reads each weight once, and with pages of 4 KiB every 64th line waits for a page's address first.
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Bytes that begin at a cache line."""
        size = -(-num_bytes // 64) * 64
        if size > len(self._left):
            self._left = zeros(max(size, PIECE))
        taken, self._left = self._left[:num_bytes], self._left[size:]
        return taken


def in_order(outputs: int) -> Order:
    """Columns as the rows of the weights come."""
    columns = library().pensar_columns()
    order = np.full(-(-outputs // columns) * columns, -1, np.int32)
    order[:outputs] = np.arange(outputs)
    return order


def gate_and_up(width: int) -> Order:
    """Panels of gates and as many ups, whose product the library joins: rows are all gates, then all ups."""
    half = library().pensar_columns() // 2
    gates = in_order(width)
    gates = np.append(gates, np.full(-len(gates) % half, -1, np.int32)).reshape(-1, half)
    gates = gates[: -(-width // half)]
    return np.stack((gates, np.where(gates < 0, -1, gates + width)), 1).ravel().astype(np.int32)


class Weights:
    """All of a model's matrices and vectors, packed; `fill` takes the model's weights as they are now."""

    def __init__(self, model: Qwen3, kind: str, team: Team) -> None:
        self.model, self.kind, self.team = model, kind, team
        self.room = Room()
        config = model.config
        self.width = config.moe_intermediate_size if config.num_experts else config.intermediate_size
        self._fills: list[Callable[[], object]] = []
        self._kept: list[object] = []
        self.layers = (Layer * config.num_layers)()
        for layer, block in zip(self.layers, model.model.layers, strict=True):
            assert isinstance(block, Block)
            self._add_block(layer, block)
        self.final_norm = self._vector(model.model.norm.weight)
        head = model.model.embed_tokens if model.lm_head is None else model.lm_head
        # Four bits cost the scores much where they save little: the head stays at eight.
        self.head = self._matrix("int8" if kind == "int4" else kind, lambda: head.weight, config.vocab_size)
        self.embedding = None if config.tied else self._table(model.model.embed_tokens.weight)
        self.fill()

    def fill(self) -> None:
        with torch.no_grad():
            for fill in self._fills:
                fill()

    def bytes(self) -> int:
        """Memory of all that is packed."""
        return sum(values.nbytes for values in self._kept if isinstance(values, Tensor))

    def _add_block(self, layer: Layer, block: Block) -> None:
        attention, mlp = block.self_attn, block.mlp
        layer.input_norm = self._vector(block.input_layernorm.weight).data_ptr()
        layer.post_norm = self._vector(block.post_attention_layernorm.weight).data_ptr()
        layer.q_norm = self._vector(attention.q_norm.weight).data_ptr()
        layer.k_norm = self._vector(attention.k_norm.weight).data_ptr()
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        outputs = sum(part.out_features for part in parts)
        layer.qkv = self._matrix(
            self.kind, lambda: torch.cat([part.weight.detach() for part in parts]), outputs
        ).struct
        layer.o = self._matrix(
            self.kind, lambda: attention.o_proj.weight, self.model.config.hidden_size
        ).struct
        if isinstance(mlp, SparseMLP):
            layer.router = self._matrix("float32", lambda: mlp.gate.weight, mlp.num_experts).struct
            stacks = self.stacks()
            layer.expert_gate_up, layer.expert_down = stacks.pair
            self._kept += [stacks, *(matrix.data for matrix in stacks.matrices)]
            self._fills.append(lambda: stacks.fill(mlp.experts.gate_up_proj, mlp.experts.down_proj))
            return
        layer.gate_up = self._matrix(
            self.kind,
            lambda: torch.cat((mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach())),
            2 * self.width,
            gate_and_up(self.width),
        ).struct
        layer.down = self._matrix(
            self.kind, lambda: mlp.down_proj.weight, self.model.config.hidden_size
        ).struct

    def stacks(self) -> "Stacks":
        """Room for the experts of a layer."""
        return Stacks(self)

    def _matrix(
        self, kind: str, weight: Callable[[], Tensor], outputs: int, order: Order | None = None
    ) -> Matrix:
        order = in_order(outputs) if order is None else order
        matrix = Matrix(kind, order, outputs, weight().shape[-1], self.room.take)
        self._kept += [matrix, matrix.data]
        self._fills.append(lambda: matrix.fill(weight(), self.team))
        return matrix

    def _vector(self, weight: Tensor) -> Tensor:
        values = torch.empty(weight.shape)
        self._kept.append(values)
        self._fills.append(lambda: values.copy_(weight.detach()))
        return values

    def _table(self, weight: Tensor) -> Tensor:
        """The embedding where it is not the head: rows are read, never multiplied."""
        values = torch.empty(weight.shape, dtype=torch.float32 if self.kind == "float32" else torch.bfloat16)
        self._kept.append(values)
        self._fills.append(lambda: values.copy_(weight.detach()))
        return values


class Stacks:
    """The packed matrices of a layer's experts."""

    def __init__(self, weights: Weights) -> None:
        num, hidden, width = weights.model.config.num_experts, weights.model.config.hidden_size, weights.width
        self._weights = weights
        gate_up, down = gate_and_up(width), in_order(hidden)
        kind, take = weights.kind, weights.room.take
        self._gate_up = [Matrix(kind, gate_up, 2 * width, hidden, take) for _ in range(num)]
        self._down = [Matrix(kind, down, hidden, width, take) for _ in range(num)]
        self.pair = tuple(
            (Linear * num)(*(matrix.struct for matrix in some)) for some in (self._gate_up, self._down)
        )

    @property
    def matrices(self) -> list[Matrix]:
        return [*self._gate_up, *self._down]

    def fill(self, gate_up_E2ID: Tensor, down_EDI: Tensor) -> None:
        for some, stacked in ((self._gate_up, gate_up_E2ID), (self._down, down_EDI)):
            for matrix, weight_OI in zip(some, stacked.detach(), strict=True):
                matrix.fill(weight_OI, self._weights.team)
