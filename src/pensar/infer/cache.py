"""Paged: the keys and values of the running requests, and attention over them.

Shape legend: N running rows, B rows of a prefill, T tokens, L longest row, C capacity, H query heads,
K key-value heads, G query heads per key-value head, h head_dim.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pensar.infer.request import Ints
from pensar.model.attention import Packed
from pensar.model.config import ModelConfig

STEP = 64
"""Capacity grows in multiples of this many tokens."""


class Paged:
    """An attend object over one contiguous slot per running request: [rows, K, C, h] per layer.

    The running rows lie dense at 0..N-1 (a finished row is replaced by the last one), so that decoding is one
    attention call over a view, without gathering. Rows and capacity double when needed, up to `slots` and
    `max_positions`. The price of contiguous slots is that every row reserves and attends over the length of the
    longest; pages of fixed size would remove that where lengths differ by orders of magnitude.

    Call `begin_prefill` or `begin_decode` before each forward pass of the model.
    """

    def __init__(
        self, config: ModelConfig, slots: int, max_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.slots = slots
        self.max_positions = max_positions
        self.device = device
        shape = (0, config.num_kv_heads, 0, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self._causal = Packed()
        self._prefill: tuple[slice, Tensor | None] | None = None
        self._cells = torch.empty(0)
        self._longest = 0
        self._mask: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows that have storage."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Tokens per row that have storage."""
        return self.keys[0].shape[2]

    def reserve(self, rows: int, tokens: int) -> None:
        """Makes room for `rows` rows of `tokens` tokens; what is stored stays."""
        if rows <= self.rows and tokens <= self.capacity:
            return
        if rows > self.rows:
            rows = min(self.slots, max(rows, 2 * self.rows))
        if tokens > self.capacity:
            tokens = -(-max(tokens, 2 * self.capacity) // STEP) * STEP
            tokens = min(tokens, self.max_positions)
        rows, tokens = max(rows, self.rows), max(tokens, self.capacity)
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                # Zeros, not whatever was in memory: masked cells take part in products, where NaN would spread.
                new = old.new_zeros(rows, old.shape[1], tokens, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                store[layer] = new

    def begin_prefill(self, first_row: int, num_tokens: int, source: list[int] | None, num_rows: int) -> None:
        """The next pass computes prompts of up to `num_tokens` from position 0, padded at their ends.

        They go to `num_rows` rows from `first_row`: row i takes the prompt `source[i]` of the pass, or its own
        where `source` is None. Equal prompts are so computed once and copied.
        """
        self.reserve(first_row + num_rows, num_tokens)
        index = None if source is None else torch.tensor(source, device=self.device)
        self._prefill = (slice(first_row, first_row + num_rows), index)

    def begin_decode(self, positions: Ints) -> None:
        """The next pass adds one token to each of the rows 0..N-1, at these positions [N]."""
        self._prefill = None
        num_rows = len(positions)
        self._longest = int(positions.max()) + 1
        self.reserve(num_rows, self._longest)
        num_kv_heads = self.keys[0].shape[1]
        first_cells = np.arange(num_rows * num_kv_heads).reshape(num_rows, num_kv_heads) * self.capacity
        cells = first_cells + positions[:, None]
        self._cells = torch.from_numpy(cells.reshape(-1)).to(self.device)
        self._mask = None
        if int(positions.min()) + 1 < self._longest:
            hidden = np.arange(self._longest) > positions[:, None]
            mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))
            self._mask = mask.to(self.device, self.keys[0].dtype)[:, None, None]

    def __call__(self, layer: int, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        if self._prefill is not None:
            self._store(layer, k_BTKh, v_BTKh)
            return self._causal(layer, q_BTHh, k_BTKh, v_BTKh)
        return self._decode(layer, q_BTHh, k_BTKh, v_BTKh)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of a row over another row."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]

    def wipe(self, row: int) -> None:
        """Zeroes a row that may hold NaN, which would outlive it: 0 * NaN is NaN even where masked."""
        if row < self.rows:
            for store in (*self.keys, *self.values):
                store[row].zero_()

    def _store(self, layer: int, k_BTKh: Tensor, v_BTKh: Tensor) -> None:
        assert self._prefill is not None
        rows, source = self._prefill
        for store, new in ((self.keys[layer], k_BTKh), (self.values[layer], v_BTKh)):
            new_BKTh = new.transpose(1, 2)
            store[rows, :, : new.shape[1]] = new_BKTh if source is None else new_BKTh.index_select(0, source)

    def _decode(self, layer: int, q_N1Hh: Tensor, k_N1Kh: Tensor, v_N1Kh: Tensor) -> Tensor:
        num_rows, _, num_kv_heads, head_dim = k_N1Kh.shape
        keys, values = self.keys[layer], self.values[layer]
        keys.view(-1, head_dim).index_copy_(0, self._cells, k_N1Kh.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, self._cells, v_N1Kh.reshape(-1, head_dim))
        # The query heads that share a key-value head become the queries of one attention problem.
        q_NKGh = q_N1Hh.reshape(num_rows, num_kv_heads, -1, head_dim)
        out_NKGh = F.scaled_dot_product_attention(
            q_NKGh,
            keys[:num_rows, :, : self._longest],
            values[:num_rows, :, : self._longest],
            attn_mask=self._mask,
        )
        return out_NKGh.reshape(q_N1Hh.shape)
