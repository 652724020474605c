"""TorchRunner: the model as it was trained, over a paged cache, on any device.

Shape legend: N tokens of all rows, R rows, q new tokens of a row, L tokens of its text, P pages of the longest row,
M rows of one new token, H query heads, K key-value heads, G query heads per key-value head, h head_dim, D hidden,
B = K M attention problems.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.infer.adapters import Adapter, Adapters
from pensar.infer.request import Ints
from pensar.infer.sampling import weigh
from pensar.infer.step import PAGE, StepBatch, StepOutput, give_back, module_bytes, run_apart
from pensar.infer.sync import replace_weights
from pensar.model.qwen3 import Qwen3


class TorchRunner:
    """Keys and values of every layer in pools [K, pages, PAGE, h], in the type of the weights.

    Rows that add one token each are attended to together over their gathered pages, others one by one with the
    library's fused kernel. The head comes first so that gathered pages are the matrices of a batched product as they
    are. The weights are the model's own: a trainer that changes them changes the runner's.
    """

    weigh = staticmethod(weigh)
    lazy_room = False

    def __init__(self, model: Qwen3) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.config = model, model.config
        self._adapters = Adapters(model)
        self.device, self._dtype = weight.device, weight.dtype
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.reserve(1)
        # The model keeps its RoPE frequencies from the first use on: let that not be in inference mode.
        model.rope_tables(torch.zeros(1, 1, dtype=torch.int64, device=weight.device))

    def reserve(self, num_pages: int) -> None:
        config = self.config
        if self.keys and num_pages <= self.keys[0].shape[1]:
            return
        shape = (config.num_kv_heads, num_pages, PAGE, config.head_dim)
        for pools in (self.keys, self.values):
            for layer in range(config.num_layers):
                # Zeros, not whatever was in memory: masked cells take part in products, where NaN would spread.
                pool = torch.zeros(shape, device=self.device, dtype=self._dtype)
                if layer < len(pools):
                    pool[:, : pools[layer].shape[1]] = pools[layer]
                    pools[layer] = pool
                else:
                    pools.append(pool)
        if self.device.type == "cpu":
            give_back()

    def run(self, batch: StepBatch) -> StepOutput:
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with torch.inference_mode():
                if batch.adapters_R is not None and self._adapters.alone(batch.adapters_R):
                    return run_apart(batch, batch.adapters_R, lambda part, _: self._run(part))
                return self._run(batch)
        finally:
            if training:
                self.model.train()

    def copy_pages(self, sources: Ints, targets: Ints) -> None:
        source, target = _there(self.device, sources), _there(self.device, targets)
        for pool in (*self.keys, *self.values):
            pool[:, target] = pool[:, source]

    def wipe_pages(self, pages: Ints) -> None:
        index = _there(self.device, pages)
        for pool in (*self.keys, *self.values):
            pool[:, index] = 0

    def read_pages(self, pages: Ints) -> Tensor:
        index = _there(self.device, pages)
        held = torch.stack([pool[:, index] for pool in (*self.keys, *self.values)])
        return held.permute(2, 0, 1, 3, 4).reshape(len(pages), -1).view(torch.uint8).cpu()

    def write_pages(self, pages: Ints, bytes_PB: Tensor) -> None:
        pools, index = (*self.keys, *self.values), _there(self.device, pages)
        heads, _, *page = pools[0].shape
        held = bytes_PB.to(self.device).view(self._dtype).view(len(pages), len(pools), heads, *page)
        for pool, part in zip(pools, held.permute(1, 2, 0, 3, 4), strict=True):
            pool[:, index] = part

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        replace_weights(self.model, weights)

    def set_adapter(self, number: int, adapter: Adapter | None) -> None:
        self._adapters.set(number, adapter)

    def page_bytes(self) -> int:
        return sum(pool[:, 0].nbytes for pool in (*self.keys, *self.values))

    def weight_bytes(self) -> int:
        return module_bytes(self.model)

    def step_bytes(self, tokens: int, texts: int) -> int:
        """Of the layer that is being computed, at whichever point holds most."""
        config, size = self.config, int(self._dtype.itemsize)
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        # The stream and its normalised copy; queries while they are rotated, or what attention takes and gives.
        attention = tokens * (2 * hidden + max(4 * heads, heads + 4 * keys, 3 * heads + 2 * keys)) * size
        # Of rows of one token: scores, and weights in float32 and in the type of the values where that is another.
        score = size + 4 + (size if size < 4 else 0)
        single = texts * (2 * keys * size + config.num_heads * score)
        # Of a chunk: the text, and the mask as it is made and as the kernel wants it.
        length = min(texts, config.max_positions)
        chunk = length * (2 * keys * size + tokens * (1 + size))
        # The stream before and after attention, its normalised copy, silu of the gate, up, and their product.
        mlp = 3 * hidden + 3 * config.intermediate_size
        if config.num_experts:  # rows come and go once for each expert, beside gate, up, and their product
            copies = config.experts_per_token
            mlp = 3 * hidden + copies * (2 * hidden + 3 * config.moe_intermediate_size)
        tables = tokens * (2 * config.head_dim * size + 16)
        return tables + max(attention + max(single, chunk), tokens * mlp * size)

    def _run(self, batch: StepBatch) -> StepOutput:
        tokens, positions = (
            _there(self.device, batch.tokens_N)[None],
            _there(self.device, batch.positions_N)[None],
        )
        with self._adapters.over(batch.adapters_R, np.diff(batch.starts), self.device):
            hidden_ND = self.model(tokens, positions, _Paged(self, batch))[0]
        if len(batch.wanted_S) < len(hidden_ND):
            hidden_ND = hidden_ND[_there(self.device, batch.wanted_S)]
        return StepOutput(self.model.logits(hidden_ND).float(), hidden_ND)


class _Paged:
    """The attend object of one pass."""

    def __init__(self, runner: TorchRunner, batch: StepBatch) -> None:
        self._keys, self._values = runner.keys, runner.values
        counts = np.diff(batch.starts)
        row_N = np.repeat(np.arange(len(counts)), counts)
        cell_N = batch.pages_RP[row_N, batch.positions_N // PAGE] * PAGE + batch.positions_N % PAGE
        self._cell_N = _there(runner.device, cell_N)
        singles = np.flatnonzero(counts == 1)
        self._all_single = len(singles) == len(counts)
        self._single_N = _there(runner.device, batch.starts[singles])
        self._mask_M1L: Tensor | None = None
        self._pages_MP = self._cell_N
        if len(singles):
            lengths = batch.lengths_R[singles]
            longest = int(lengths.max())
            self._pages_MP = _there(runner.device, batch.pages_RP[singles, : -(-longest // PAGE)])
            if (lengths < self._pages_MP.shape[1] * PAGE).any():
                hidden = np.arange(self._pages_MP.shape[1] * PAGE) >= lengths[:, None]
                mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))
                self._mask_M1L = mask.to(runner.device, self._keys[0].dtype)[:, None]
        self._others = [_Chunk(runner, batch, row) for row in np.flatnonzero(counts > 1).tolist()]

    def __call__(self, layer: int, q_1NHh: Tensor, k_1NKh: Tensor, v_1NKh: Tensor) -> Tensor:
        q_NHh = q_1NHh[0]
        for pool, new_1NKh in ((self._keys[layer], k_1NKh), (self._values[layer], v_1NKh)):
            pool.view(pool.shape[0], -1, pool.shape[3]).index_copy_(
                1, self._cell_N, new_1NKh[0].transpose(0, 1)
            )
        if self._all_single:
            return self._decode(layer, q_NHh)[None]
        out_NHh = torch.empty_like(q_NHh)
        if len(self._single_N):
            out_NHh[self._single_N] = self._decode(layer, q_NHh[self._single_N])
        for chunk in self._others:
            out_NHh[chunk.tokens] = chunk(q_NHh, self._keys[layer], self._values[layer])
        return out_NHh[None]

    def _decode(self, layer: int, q_MHh: Tensor) -> Tensor:
        """Rows of one new token each: the query heads that share keys become the queries of one problem."""
        keys, values = self._keys[layer], self._values[layer]
        num, heads, size = len(q_MHh), keys.shape[0], keys.shape[3]
        k_BLh = keys.index_select(1, self._pages_MP.flatten()).view(heads * num, -1, size)
        v_BLh = values.index_select(1, self._pages_MP.flatten()).view(heads * num, -1, size)
        q_KMGh = q_MHh.view(num, heads, -1, size).transpose(0, 1) * size**-0.5
        scores_BGL = q_KMGh.reshape(heads * num, -1, size) @ k_BLh.mT
        if self._mask_M1L is not None:
            scores_BGL.view(heads, num, -1, k_BLh.shape[1]).add_(self._mask_M1L)
        wide = torch.promote_types(scores_BGL.dtype, torch.float32)
        weights_BGL = scores_BGL.softmax(-1, dtype=wide).to(values.dtype)
        out_MHh: Tensor = (
            (weights_BGL @ v_BLh).view(heads, num, -1, size).transpose(0, 1).reshape(q_MHh.shape)
        )
        return out_MHh


class _Chunk:
    """Causal attention of a row's q new tokens over its text."""

    def __init__(self, runner: TorchRunner, batch: StepBatch, row: int) -> None:
        start, stop, length = int(batch.starts[row]), int(batch.starts[row + 1]), int(batch.lengths_R[row])
        self.tokens = slice(start, stop)
        self._length = length
        self._pages = _there(runner.device, batch.pages_RP[row, : -(-length // PAGE)])
        self._mask_qL: Tensor | None = None
        if length > stop - start:
            at = torch.arange(length, device=runner.device)
            self._mask_qL = at[None] <= at[length - (stop - start) :, None]

    def __call__(self, q_NHh: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k_KLh = keys.index_select(1, self._pages).flatten(1, 2)[:, : self._length]
        v_KLh = values.index_select(1, self._pages).flatten(1, 2)[:, : self._length]
        out_1Hqh = F.scaled_dot_product_attention(
            q_NHh[None, self.tokens].transpose(1, 2),
            k_KLh[None],
            v_KLh[None],
            attn_mask=self._mask_qL,
            is_causal=self._mask_qL is None,
            enable_gqa=True,
        )
        return out_1Hqh[0].transpose(0, 1)


def _there(device: torch.device, values: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
