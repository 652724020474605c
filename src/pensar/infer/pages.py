"""PagePool: which pages of the cache are whose, and which hold a text that another request may begin with.

A full page is known by the hash of its tokens and of all before them, so that equal beginnings of texts share pages
(prefix caching): while anyone reads a page it stays, afterwards it is the longest unread that is given away first.
With a spill, what is given away is kept there and comes back when it is asked for. Storage is the runner's; the pool
deals in page numbers.
"""

import hashlib
import itertools
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from pensar.infer.request import Ints
from pensar.infer.spill import Spill
from pensar.infer.step import PAGE


class PagePool:
    """`num_pages` pages of PAGE tokens; page 0 is nobody's.

    Every page is in one of three states: free, held by one reader or more, or kept for its content with no reader.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.readers: npt.NDArray[np.int32] = np.zeros(num_pages, np.int32)
        self._free = list(range(num_pages - 1, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Pages with a key and no reader, the longest unread first."""
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # Nobody can compute which texts would share a page with another's.
        self._salt = secrets.token_bytes(16)
        self.spill: Spill | None = None
        """Where known pages go that are given away."""

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    @property
    def num_held(self) -> int:
        """Pages with a reader."""
        return self.num_pages - 1 - self.available

    @property
    def num_kept(self) -> int:
        """Pages that nobody reads and that are kept for the text they hold."""
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """Pages with one reader each; raises IndexError where fewer are available."""
        if count > self.available:
            raise IndexError(f"{count} pages asked for, {self.available} available")
        pages, given = [], []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                given.append((page, self._forget(page)))
            pages.append(page)
        if given and self.spill is not None:
            self.spill.save([page for page, _ in given], [key for _, key in given])
        self.readers[pages] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reader for each."""
        for page in pages:
            if self.readers[page] == 0:
                del self._kept[page]
            self.readers[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reader fewer for each, the end of a text before its beginning: that is worth most to others."""
        for page in reversed(list(pages)):
            self.readers[page] -= 1
            if self.readers[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning, each with one more reader; what was spilled comes back."""
        spilled = () if self.spill is None else self.spill
        known = list(itertools.takewhile(lambda key: key in self._page_of or key in spilled, keys))
        # First those that are here: pages for what comes back must not be theirs.
        self.share(self._page_of[key] for key in known if key in self._page_of)
        if self.spill is not None:
            self._bring_back(self.spill, [key for key in known if key not in self._page_of])
        pages = [self._page_of[key] for key in known if key in self._page_of]
        whole = next((n for n, key in enumerate(known) if key not in self._page_of), len(known))
        self.release(pages[whole:])
        return pages[:whole]

    def publish(self, page: int, key: bytes) -> None:
        """Says what a full page holds, once; of equal pages the first is the one that is shared."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, pages: Iterable[int]) -> None:
        """These pages are not known by their content any more."""
        for page in pages:
            if page in self._key_of:
                key = self._forget(page)
                if self.spill is not None:
                    self.spill.drop(key)
                if self._kept.pop(page, 0) is None:
                    self._free.append(page)

    def forget_all(self) -> None:
        """No page is known by its content any more, as when the weights have changed."""
        self._page_of.clear()
        self._key_of.clear()
        self._free.extend(self._kept)
        self._kept.clear()
        if self.spill is not None:
            self.spill.clear()

    def disown(self) -> None:
        """`forget_all`, and pages that follow what was known till now are never found: running texts that go on over
        keys and values of other weights keep theirs to themselves."""
        self.forget_all()
        self._salt = secrets.token_bytes(16)

    def root(self, *parts: str) -> bytes:
        """The key that the first page of a text follows; texts with other `parts` share nothing."""
        return hashlib.blake2b("\0".join(parts).encode(), key=self._salt, digest_size=16).digest()

    def keys(self, root: bytes, tokens: Ints) -> list[bytes]:
        """The key of every full page of `tokens`, which begin after `root`."""
        found = []
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            root = self.key(root, tokens[start : start + PAGE])
            found.append(root)
        return found

    def key(self, before: bytes, tokens: Ints) -> bytes:
        """The key of a page with these PAGE tokens after the page with the key `before`."""
        return hashlib.blake2b(before + tokens.tobytes(), key=self._salt, digest_size=16).digest()

    def check(self) -> None:
        """Raises AssertionError unless every page is in exactly one state; for tests."""
        free, kept = set(self._free), set(self._kept)
        held = set(np.flatnonzero(self.readers).tolist())
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(kept) + len(held) == len(free | kept | held), "a page is in two states"
        assert free | kept | held == set(range(1, self.num_pages)), "a page is lost"
        assert (self.readers >= 0).all(), "a page was released too often"
        assert kept <= self._key_of.keys(), "a page without content is kept"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "keys and pages disagree"
        if self.spill is not None:
            self.spill.check()

    def _bring_back(self, spill: Spill, keys: Sequence[bytes]) -> None:
        """Pages with one reader for the first of `keys`, as many as there is room for and as can be read."""
        bytes_PB = spill.read(keys[: self.available])
        # Giving pages away may push what has just been read out of the spill: it is a copy.
        pages = self.take(len(bytes_PB))
        spill.restore(pages, bytes_PB)
        for page, key in zip(pages, keys, strict=False):
            self.publish(page, key)

    def _forget(self, page: int) -> bytes:
        """The key that it had."""
        key = self._key_of.pop(page)
        del self._page_of[key]
        return key
