"""Paged: the keys and values of the running requests, and attention over them.

Shape legend: N running rows, B rows of a prefill, T tokens, L longest row, C capacity, H query heads,
K key-value heads, G query heads per key-value head, h head_dim, M = N * K attention problems.
"""

import numpy as np
import torch
from torch import Tensor

from pensar.infer.request import Ints
from pensar.model.attention import Packed
from pensar.model.config import ModelConfig

STEP = 64
SKEW = 16
"""Capacity is a multiple of STEP plus SKEW: rows a power of two apart would fall on the same cache lines."""


class Paged:
    """An attend object over one contiguous slot per running request.

    Per layer, keys are [rows, K, h, C] and values [rows, K, C, h]: so both products of decoding run along memory,
    which takes three quarters of the time of fused attention over equal layouts (430 against 575 microseconds a layer
    for 64 rows of 150 tokens, 4 heads of 32 over 2 key-value heads, one core).

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
        heads, size = config.num_kv_heads, config.head_dim
        layers = range(config.num_layers)
        self.keys = [torch.zeros(0, heads, size, 0, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(0, heads, 0, size, device=device, dtype=dtype) for _ in layers]
        self._causal = Packed()
        self._prefill: tuple[slice, Tensor | None] | None = None
        self._key_cells = torch.empty(0)
        self._value_cells = torch.empty(0)
        self._longest = 0
        self._mask: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows that have storage."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Tokens per row that have storage."""
        return self.keys[0].shape[3]

    def reserve(self, rows: int, tokens: int) -> None:
        """Makes room for `rows` rows of `tokens` tokens; what is stored stays."""
        if rows <= self.rows and tokens <= self.capacity:
            return
        if rows > self.rows:
            rows = min(self.slots, max(rows, 2 * self.rows))
        if tokens > self.capacity:
            tokens = min(max(tokens, 2 * self.capacity), self.max_positions)
            tokens = -(-(tokens - SKEW) // STEP) * STEP + SKEW
        rows, tokens = max(rows, self.rows), max(tokens, self.capacity)
        # Zeros, not whatever was in memory: masked cells take part in products, where NaN would spread.
        for layer, old in enumerate(self.keys):
            self.keys[layer] = old.new_zeros(rows, *old.shape[1:3], tokens)
            self.keys[layer][: old.shape[0], :, :, : old.shape[3]] = old
        for layer, old in enumerate(self.values):
            self.values[layer] = old.new_zeros(rows, old.shape[1], tokens, old.shape[3])
            self.values[layer][: old.shape[0], :, : old.shape[2]] = old

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
        heads, size = self.keys[0].shape[1:3]
        problem = np.arange(num_rows * heads).reshape(num_rows, heads)
        value_cells = problem * self.capacity + positions[:, None]
        first_key_cells = problem * (size * self.capacity) + positions[:, None]
        key_cells = first_key_cells[:, :, None] + np.arange(size) * self.capacity
        self._value_cells = torch.from_numpy(value_cells.reshape(-1)).to(self.device)
        self._key_cells = torch.from_numpy(key_cells.reshape(-1)).to(self.device)
        self._mask = None
        if int(positions.min()) + 1 < self._longest:
            hidden = np.arange(self._longest) > positions[:, None]
            mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))
            self._mask = mask.to(self.device, self.keys[0].dtype)[:, None]

    def __call__(self, layer: int, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor) -> Tensor:
        if self._prefill is not None:
            self._store(layer, k_BTKh, v_BTKh)
            return self._causal(layer, q_BTHh, k_BTKh, v_BTKh)
        return self._decode(layer, q_BTHh, k_BTKh, v_BTKh)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of a row over another row."""
        for keys in self.keys:
            keys[target, :, :, :length] = keys[source, :, :, :length]
        for values in self.values:
            values[target, :, :length] = values[source, :, :length]

    def wipe(self, row: int) -> None:
        """Zeroes a row that may hold NaN, which would outlive it: 0 * NaN is NaN even where masked."""
        if row < self.rows:
            for store in (*self.keys, *self.values):
                store[row].zero_()

    def _store(self, layer: int, k_BTKh: Tensor, v_BTKh: Tensor) -> None:
        assert self._prefill is not None
        rows, source = self._prefill
        num_tokens = k_BTKh.shape[1]
        if source is not None:
            k_BTKh, v_BTKh = k_BTKh.index_select(0, source), v_BTKh.index_select(0, source)
        self.keys[layer][rows, :, :, :num_tokens] = k_BTKh.permute(0, 2, 3, 1)
        self.values[layer][rows, :, :num_tokens] = v_BTKh.transpose(1, 2)

    def _decode(self, layer: int, q_N1Hh: Tensor, k_N1Kh: Tensor, v_N1Kh: Tensor) -> Tensor:
        num_rows, _, heads, size = k_N1Kh.shape
        keys, values = self.keys[layer], self.values[layer]
        keys.view(-1).scatter_(0, self._key_cells, k_N1Kh.reshape(-1))
        values.view(-1, size).index_copy_(0, self._value_cells, v_N1Kh.reshape(-1, size))
        num_problems = num_rows * heads
        k_MhL = keys.view(-1, size, self.capacity)[:num_problems, :, : self._longest]
        v_MLh = values.view(-1, self.capacity, size)[:num_problems, : self._longest]
        # The query heads that share a key-value head become the queries of one attention problem.
        scores_MGL = torch.bmm(q_N1Hh.reshape(num_problems, -1, size) * size**-0.5, k_MhL)
        if self._mask is not None:
            scores_MGL.view(num_rows, -1, self._longest).add_(self._mask)
        weights_MGL = scores_MGL.softmax(-1, dtype=torch.float32).to(v_MLh.dtype)
        return torch.bmm(weights_MGL, v_MLh).view(q_N1Hh.shape)
