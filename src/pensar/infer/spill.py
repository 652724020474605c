"""Spill: pages that the cache gave away, kept in host memory or in a file, and copied back where a text begins so.

Giving a page away and taking it back costs about a tenth of computing its tokens for 34 million weights in eight bits
(`benchmarks/engine_spill.py`), and less in wider models: pages grow with the width, products with its square.
What cannot be written or read back is computed again: a fault of a disk costs time and never a reply.
Shape legend: P pages, B bytes of a page.
"""

import logging
import os
import tempfile
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.files import free_bytes
from pensar.infer.step import Runner

log = logging.getLogger(__name__)


class SpillConfig(Config, frozen=True):
    """How much is kept of what the cache gives away, and where."""

    max_bytes: int
    folder: Path | None = None
    """For a file of the process's own, which has no name there and ends with the process, however it ends; None keeps
    pages in memory."""


class Spill:
    """The latest pages by their keys, the longest unused of them forgotten first; the pool says which and when."""

    def __init__(self, runner: Runner, config: SpillConfig, reserve: Callable[[int], None]) -> None:
        """`reserve(page)` makes room in the runner's cache. Raises ConfigError for a size that cannot be."""
        self._runner, self._reserve = runner, reserve
        self.page_bytes = runner.read_pages(np.zeros(1, np.int64)).shape[1]
        self.capacity = config.max_bytes // self.page_bytes
        """Pages; less than asked for once a disk is full."""
        limit = _memory() if config.folder is None else free_bytes(config.folder)
        if not self.page_bytes <= config.max_bytes <= limit:
            place = "memory" if config.folder is None else f"the disk of {config.folder}"
            raise ConfigError(
                f"a spill of {config.max_bytes:,} bytes: a page of this model takes {self.page_bytes:,} and {place} "
                f"has {limit:,}; give a size between the two"
            )
        if config.folder is None:
            self._store: _Store = _Memory(self.capacity, self.page_bytes)
        else:
            self._store = _File(config.folder, self.capacity, self.page_bytes)
        self.memory_bytes = 0 if config.folder is not None else self.capacity * self.page_bytes
        """What it takes when it is full."""
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()
        """The longest unused first."""
        self._free = list(range(self.capacity - 1, -1, -1))
        self.num_saved = 0
        """Pages that were ever written."""
        self.num_restored = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def save(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """Keeps what these pages hold, the last of them longest; a key stands for the same bytes whenever it comes."""
        for key in keys:
            if key in self._slot_of:
                self._slot_of.move_to_end(key)
        fresh = [(page, key) for page, key in zip(pages, keys, strict=True) if key not in self._slot_of]
        fresh = fresh[-self.capacity :] if self.capacity else []
        if not fresh:
            return
        while len(self._free) < len(fresh):
            _, slot = self._slot_of.popitem(last=False)
            self._free.append(slot)
        slots = [self._free.pop() for _ in fresh]
        written = self._store.write(slots, self._runner.read_pages(np.asarray([page for page, _ in fresh])))
        self._slot_of.update((key, slot) for (_, key), slot in zip(fresh[:written], slots, strict=False))
        self.num_saved += written
        if written < len(fresh):  # the disk has no more room: what was written stays its size
            self._free = []
            self.capacity = len(self._slot_of)

    def read(self, keys: Sequence[bytes]) -> Tensor:
        """The bytes of the first of `keys` [P, bytes of a page], as far as they are here and sound."""
        bytes_PB = self._store.read([self._slot_of[key] for key in keys])
        if len(bytes_PB) < len(keys):
            self.drop(keys[len(bytes_PB)])
        for key in reversed(keys[: len(bytes_PB)]):  # a beginning is worth more than what follows it
            self._slot_of.move_to_end(key)
        return bytes_PB

    def restore(self, pages: Sequence[int], bytes_PB: Tensor) -> None:
        """Copies what was read into pages of the cache."""
        if len(pages):
            self._reserve(max(pages))
            self._runner.write_pages(np.asarray(pages), bytes_PB)
            self.num_restored += len(pages)

    def drop(self, key: bytes) -> None:
        """Forgets a page, if it is here."""
        slot = self._slot_of.pop(key, None)
        if slot is not None:
            self._free.append(slot)

    def clear(self) -> None:
        """Forgets all."""
        self._free.extend(self._slot_of.values())
        self._slot_of.clear()

    def check(self) -> None:
        """Raises AssertionError unless every slot is free or holds one page; for tests."""
        used, free = set(self._slot_of.values()), set(self._free)
        assert len(used) == len(self._slot_of), "two pages lie in one slot"
        assert len(free) == len(self._free), "a slot is free twice"
        assert not used & free, "a slot is free and in use"
        assert len(used) + len(free) == self.capacity, "a slot is lost"


class _Store(Protocol):
    """Room for pages of one size, by slot."""

    def write(self, slots: Sequence[int], bytes_PB: Tensor) -> int:
        """How many of them were written, in order."""
        ...

    def read(self, slots: Sequence[int]) -> Tensor:
        """As many of them, in order, as are what was written."""
        ...


class _Memory:
    """The system gives the memory as it is first written to."""

    def __init__(self, capacity: int, page_bytes: int) -> None:
        self._held = torch.empty(capacity, page_bytes, dtype=torch.uint8)

    def write(self, slots: Sequence[int], bytes_PB: Tensor) -> int:
        self._held[torch.tensor(slots)] = bytes_PB
        return len(slots)

    def read(self, slots: Sequence[int]) -> Tensor:
        return self._held[torch.tensor(slots, dtype=torch.int64)]


class _File:
    """Every page has a checksum in memory; the first fault is logged, and further ones are not."""

    def __init__(self, folder: Path, capacity: int, page_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._page_bytes = folder, page_bytes
        self._fd, name = tempfile.mkstemp(prefix="pensar-spill-", dir=folder)
        weakref.finalize(self, os.close, self._fd)
        Path(name).unlink()
        self._sums = [0] * capacity
        self._warned = False

    def write(self, slots: Sequence[int], bytes_PB: Tensor) -> int:
        for done, (slot, row_B) in enumerate(zip(slots, bytes_PB.contiguous().numpy(), strict=True)):
            try:
                size = os.pwrite(self._fd, row_B, slot * self._page_bytes)
            except OSError as error:
                free = free_bytes(self._folder)
                self._warn(
                    f"the spilled cache grows no further: {error}; {self._folder} has {free:,} bytes free"
                )
                return done
            if size < self._page_bytes:
                self._warn(
                    f"the spilled cache grows no further: {self._folder} took {size:,} bytes of a page"
                )
                return done
            self._sums[slot] = zlib.crc32(row_B)
        return len(slots)

    def read(self, slots: Sequence[int]) -> Tensor:
        bytes_PB = torch.empty(len(slots), self._page_bytes, dtype=torch.uint8)
        for done, (slot, row_B) in enumerate(zip(slots, bytes_PB.numpy(), strict=True)):
            try:
                size = os.preadv(self._fd, [row_B], slot * self._page_bytes)
            except OSError as error:
                size = 0
                self._warn(f"a spilled page cannot be read back and is computed again: {error}")
            if size < self._page_bytes or zlib.crc32(row_B) != self._sums[slot]:
                self._warn(f"a spilled page in {self._folder} is not what was written; it is computed again")
                return bytes_PB[:done]
        return bytes_PB

    def _warn(self, text: str) -> None:
        if not self._warned:
            log.warning("%s", text)
        self._warned = True


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
