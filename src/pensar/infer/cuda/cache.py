"""SlabCache: the pages of keys and values in slabs that never move, so that captured graphs outlive growth.

Shape legend: L layers, K key-value heads, h head_dim, P pages.
"""

import numpy as np
import torch
from torch import Tensor

from pensar.base.errors import RunError
from pensar.infer.request import Ints
from pensar.infer.step import PAGE
from pensar.model.config import ModelConfig

SLAB = 64
"""Pages of a slab."""
MAX_SLABS = 65_536
"""Entries of the table of slabs, which graphs hold on to: 67 million tokens."""


class SlabCache:
    """Slabs [L, keys and values, SLAB, K, PAGE, h]; page p lies in slab p // SLAB.

    Kernels start from the first slab and find another by its distance in `distances`, in elements.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._shape = (config.num_layers, 2, SLAB, config.num_kv_heads, PAGE, config.head_dim)
        self._device, self._dtype = device, dtype
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.distances = torch.zeros(MAX_SLABS, dtype=torch.int64, device=device)
        self.slabs: list[Tensor] = []
        self.reserve(1)

    @property
    def first(self) -> Tensor:
        return self.slabs[0]

    def reserve(self, num_pages: int) -> None:
        """Adds slabs; what is stored stays where it is."""
        needed = -(-num_pages // SLAB)
        if needed > MAX_SLABS:
            raise RunError(f"{num_pages:,} pages are more than {MAX_SLABS * SLAB:,}; give cache_tokens less")
        while len(self.slabs) < needed:
            slab = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
            self.slabs.append(slab)
            distance = (slab.data_ptr() - self.first.data_ptr()) // slab.element_size()
            self.distances[len(self.slabs) - 1] = distance

    def start(self, layer: int, which: int) -> int:
        """Elements from a slab's beginning to its keys (0) or values (1) of a layer."""
        return (layer * 2 + which) * self.first[0, 0].numel()

    def held(self, layer: int, which: int, pages: Tensor) -> Tensor:
        """Keys or values of pages in one piece [K, P * PAGE, h]; a copy."""
        found = torch.stack([self._page(int(page))[layer, which] for page in pages.tolist()], 1)
        return found.flatten(1, 2)

    def put(self, layer: int, which: int, page: int, offset: int, values_Kh: Tensor) -> None:
        """Keys or values of one token."""
        self._page(page)[layer, which, :, offset] = values_Kh

    def copy_pages(self, sources: Ints, targets: Ints) -> None:
        for target, held in zip(targets.tolist(), self.read(sources), strict=True):
            self._page(target).copy_(held)

    def wipe_pages(self, pages: Ints) -> None:
        for slab, _, inside in self._by_slab(pages):
            slab[:, :, inside] = 0

    def read(self, pages: Ints) -> Tensor:
        """Copies of pages [P, L, 2, K, PAGE, h]."""
        if not len(pages):
            return self.first.new_empty(0, *self._page(0).shape)
        parts, places = [], []
        for slab, where, inside in self._by_slab(pages):
            parts.append(slab[:, :, inside].movedim(2, 0))
            places.append(where)
        order = torch.from_numpy(np.argsort(np.concatenate(places)))
        return torch.cat(parts)[order.to(self._device)]

    def read_pages(self, pages: Ints) -> Tensor:
        return self.read(pages).flatten(1).view(torch.uint8).cpu()

    def write_pages(self, pages: Ints, bytes_PB: Tensor) -> None:
        held = bytes_PB.to(self._device).view(self._dtype).view(len(pages), *self._page(0).shape)
        for slab, where, inside in self._by_slab(pages):
            slab[:, :, inside] = held[torch.from_numpy(where).to(self._device)].movedim(0, 2)

    def page_bytes(self) -> int:
        return self.first.nbytes // SLAB

    def _page(self, page: int) -> Tensor:
        """[L, 2, K, PAGE, h]."""
        return self.slabs[page // SLAB][:, :, page % SLAB]

    def _by_slab(self, pages: Ints) -> list[tuple[Tensor, Ints, Tensor]]:
        """For each slab that has some of the pages: it, which of them, and where they are in it."""
        found = []
        for number in np.unique(pages // SLAB).tolist():
            where = np.flatnonzero(pages // SLAB == number)
            inside = torch.from_numpy(pages[where] % SLAB).to(self._device)
            found.append((self.slabs[number], where, inside))
        return found
