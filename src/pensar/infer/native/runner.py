"""NativeRunner: a model on a CPU through the C++ library, one call a step; the same bits for any batch and any chunks.

Weights are packed beside the module's own, in float32, bfloat16, int8 or int4; keys and values lie in pages of float32,
bfloat16 or int8. Every sum has one order, whatever is computed beside it and by how many threads.
Shape legend: N tokens of all rows, R rows, P pages of the longest row, S wanted tokens, V vocabulary, D hidden,
L layers, h head_dim.
"""

import ctypes
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pensar.base.errors import ConfigError, ModelError
from pensar.infer.adapters import Adapter
from pensar.infer.native.changes import Changes
from pensar.infer.native.library import describe, library
from pensar.infer.native.pack import Team, Weights, zeros
from pensar.infer.native.structs import Batch, Layer, Model
from pensar.infer.request import Ints
from pensar.infer.step import StepBatch, StepOutput, give_back, module_bytes, run_apart
from pensar.infer.sync import replace_weights
from pensar.model.qwen3 import Qwen3

Kind = Literal["float32", "bfloat16", "int8", "int4"]
CacheKind = Literal["float32", "bfloat16", "int8"]
CACHES = {"float32": 0, "bfloat16": 1, "int8": 2}
GROUP, GROUP_BYTES = 64, 80
"""Inputs of a row of bytes that share a scale, and what they take with it (gemm.h)."""
POSITIONS = 1_024
"""Positions of one piece of the tables of angles; each piece is computed alike whenever it is needed."""
FAULTS = {
    1: "a token is not in the vocabulary",
    2: "a position is negative or beyond the tables",
    3: "a row has no new token, or fewer pages than its text takes",
    4: "a page is not in the cache",
    5: "an adapter is not loaded",
    6: "the wanted tokens do not ascend within the batch",
}


class NativeRunner:
    """Weights as they were when the runner was made or last loaded; the module may go on being trained meanwhile."""

    lazy_room = True

    def __init__(
        self,
        model: Qwen3,
        weights: Kind = "float32",
        *,
        cache: CacheKind = "float32",
        threads: int | None = None,
        pin: bool = False,
    ) -> None:
        """`threads`: None for one; with `pin` they keep to cores of their own, for a machine that serves nothing else.
        Raises RunError where the library cannot be built."""
        self.model, self.config = model, model.config
        if model.model.embed_tokens.weight.device.type != "cpu":
            raise ConfigError(
                f"the model is on {model.model.embed_tokens.weight.device}; native kernels are for CPUs"
            )
        self.device = torch.device("cpu")
        self.weights, self.cache = weights, cache
        self._library = library()
        self._team = Team(threads or 1, pin)
        self._packed = Weights(model, weights, self._team)
        give_back()
        self._changes = Changes(self._packed)
        self._angles = torch.empty(2, 0, self.config.head_dim // 2)
        self._page_bytes = self.config.num_kv_heads * self._library.pensar_head_bytes(
            CACHES[cache], self.config.head_dim
        )
        self._store = torch.zeros(self.config.num_layers, 0, self._page_bytes, dtype=torch.uint8)
        self._struct = self._shape()
        self.reserve(1)
        self._reach(1)

    def describe(self) -> str:
        """What computes, for the log."""
        return f"{describe()}, weights {self.weights}, cache {self.cache}, {self._team.threads} threads"

    def use_threads(self, threads: int, *, pin: bool = False) -> None:
        """Computes with so many from now on; results stay the same bits."""
        self._team = Team(threads, pin)
        self._packed.team = self._team

    def reserve(self, num_pages: int) -> None:
        old = self._store
        if num_pages <= old.shape[1]:
            return
        self._store = zeros(self.config.num_layers * num_pages * self._page_bytes).view(
            self.config.num_layers, num_pages, self._page_bytes
        )
        self._store[:, : old.shape[1]] = old
        self._struct.store, self._struct.pages = self._store.data_ptr(), num_pages

    def run(self, batch: StepBatch) -> StepOutput:
        numbers = batch.adapters_R
        if numbers is None or not self._changes.alone(numbers):
            return self._run(batch, self._packed.layers)
        return run_apart(batch, numbers, lambda part, number: self._run(part, self._changes.layers(number)))

    def copy_pages(self, sources: Ints, targets: Ints) -> None:
        self._store[:, torch.from_numpy(targets)] = self._store[:, torch.from_numpy(sources)]

    def wipe_pages(self, pages: Ints) -> None:
        self._store[:, torch.from_numpy(pages)] = 0

    def read_pages(self, pages: Ints) -> Tensor:
        return self._store[:, torch.from_numpy(pages)].transpose(0, 1).reshape(len(pages), -1)

    def write_pages(self, pages: Ints, bytes_PB: Tensor) -> None:
        layers = bytes_PB.view(len(pages), self.config.num_layers, self._page_bytes)
        self._store[:, torch.from_numpy(pages)] = layers.transpose(0, 1)

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        replace_weights(self.model, weights)
        self.refresh()

    def set_adapter(self, number: int, adapter: Adapter | None) -> None:
        self._changes.set(number, adapter)
        self._struct.adapters = self._changes.places

    def weigh(
        self, logits_NV: Tensor, temperature_N1: Tensor | None, uniform_N: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        num, vocabulary = logits_NV.shape
        # Names keep the copies alive that the library reads from.
        logits_NV, uniform_N = logits_NV.contiguous(), None if uniform_N is None else uniform_N.contiguous()
        temperature_N1 = None if temperature_N1 is None else temperature_N1.contiguous()
        ids_N, top_N, total_N = torch.empty(num, dtype=torch.int64), torch.empty(num), torch.empty(num)
        self._library.pensar_weigh(
            logits_NV.data_ptr(),
            num,
            vocabulary,
            None if temperature_N1 is None else temperature_N1.data_ptr(),
            None if uniform_N is None else uniform_N.data_ptr(),
            ids_N.data_ptr(),
            top_N.data_ptr(),
            total_N.data_ptr(),
            self._team.handle,
        )
        return ids_N, top_N, total_N

    def page_bytes(self) -> int:
        return int(self.config.num_layers * self._page_bytes)

    def weight_bytes(self) -> int:
        """Memory of the module's weights and of the packed ones beside them."""
        return module_bytes(self.model) + self._packed.bytes()

    def step_bytes(self, tokens: int, texts: int) -> int:
        """Attention reads the pages where they lie: `texts` takes nothing."""
        config, copies = self.config, max(1, self.config.experts_per_token)
        attended = config.num_heads * config.head_dim
        most = max(config.hidden_size, attended, self._packed.width)
        values = 2 * config.hidden_size + 2 * attended + 2 * config.num_kv_heads * config.head_dim
        values += copies * self._packed.width
        if config.num_experts:
            values += config.num_experts + copies * config.hidden_size
        return tokens * (4 * values + copies * -(-most // GROUP) * GROUP_BYTES)

    def hidden(self, batch: StepBatch) -> Tensor:
        """The states [S, D] of `run` alone, without adapters."""
        return self._step(batch, self._packed.layers, None)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores [N, V] of states, the bits that `run` gives for them."""
        return self._packed.head.product(hidden_ND, self._team)

    def refresh(self) -> None:
        """Packs the module's weights as they are now."""
        self._packed.fill()

    def _run(self, batch: StepBatch, layers: "ctypes.Array[Layer]") -> StepOutput:
        logits_SV = torch.empty(len(batch.wanted_S), self.config.vocab_size)
        return StepOutput(logits_SV, self._step(batch, layers, logits_SV))

    def _step(self, batch: StepBatch, layers: "ctypes.Array[Layer]", logits_SV: Tensor | None) -> Tensor:
        self._reach(int(batch.positions_N.max()) + 1)
        num = len(batch.wanted_S)
        hidden_SD = torch.empty(num, self.config.hidden_size)
        arrays = [
            None if values is None else np.ascontiguousarray(values, np.int64)
            for values in (
                batch.tokens_N,
                batch.positions_N,
                batch.starts,
                batch.lengths_R,
                batch.pages_RP,
                batch.wanted_S,
                batch.adapters_R,
            )
        ]
        pointers = [None if values is None else values.ctypes.data for values in arrays]
        self._struct.layers = layers
        struct = Batch(
            len(batch.lengths_R),
            len(batch.tokens_N),
            num,
            batch.pages_RP.shape[1],
            *pointers,
            None if logits_SV is None else logits_SV.data_ptr(),
            hidden_SD.data_ptr(),
        )
        fault = self._library.pensar_step(ctypes.byref(self._struct), ctypes.byref(struct), self._team.handle)
        if fault:
            raise ModelError(f"the step cannot be computed: {FAULTS[fault]}")
        return hidden_SD

    def _shape(self) -> Model:
        config, packed = self.config, self._packed
        struct = Model(
            config.vocab_size,
            config.hidden_size,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            packed.width,
            config.num_experts,
            config.experts_per_token,
            int(config.norm_topk_prob),
        )
        struct.eps = config.rms_norm_eps
        struct.head = packed.head.struct
        struct.final_norm = packed.final_norm.data_ptr()
        if packed.embedding is not None:
            struct.embedding = packed.embedding.data_ptr()
            struct.embedding_kind = 0 if packed.embedding.dtype == torch.float32 else 1
        struct.layers = packed.layers
        struct.cache, struct.page_bytes = CACHES[self.cache], self._page_bytes
        return struct

    def _reach(self, positions: int) -> None:
        """Tables of angles for so many positions, the model's own values."""
        known = self._angles.shape[1]
        if positions <= known:
            return
        pieces = [self._angles]
        for first in range(known, positions, POSITIONS):
            with torch.no_grad():
                tables = self.model.rope_tables(torch.arange(first, first + POSITIONS)[None])
            half = self.config.head_dim // 2
            pieces.append(torch.stack([table[0, :, 0, :half] for table in tables]))
        self._angles = torch.cat(pieces, 1).contiguous()
        self._struct.cosine, self._struct.sine = (table.data_ptr() for table in self._angles)
        self._struct.positions = self._angles.shape[1]
