"""Words of a text as 64-bit hashes, computed for the whole text at once.

Letters, digits and marks make words; scripts that write no spaces give one word a character, so that n-grams mean
the same everywhere. Filters, near-duplicate search and decontamination share this view.
"""

import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

from pensar.data.hashing import Words64, mix64

SEPARATOR, LETTER, DIGIT, ALONE, OPERATOR = 0, 1, 2, 3, 4
OPERATORS = "+-*/%^<>=|&~"
TABLE_SIZE = 0x20000
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
)
_BASE = 0x9E3779B97F4A7C15 | 1
_INVERSE = pow(_BASE, -1, 1 << 64)

Positions = npt.NDArray[np.int64]


class Words:
    """The words of one text, lower-cased.

    `starts` and `ends` are positions in `codes`, the code points of the lower-cased text; `hashes` has one entry
    a word. With `operators`, each arithmetic sign is a word too: sums that differ in a sign are different.
    """

    def __init__(self, text: str, *, operators: bool = False) -> None:
        lowered = text.lower()
        self.codes: npt.NDArray[np.uint32] = np.frombuffer(lowered.encode("utf-32-le", "replace"), np.uint32)
        classes = character_classes()[np.minimum(self.codes, TABLE_SIZE - 1)]
        # Beyond the table lie the rare Han characters of the supplementary planes.
        classes = np.where(self.codes >= TABLE_SIZE, ALONE, classes)
        if not operators:
            classes = np.where(classes == OPERATOR, SEPARATOR, classes)
        self.classes = classes
        joins = (classes == LETTER) | (classes == DIGIT)
        begins = classes != SEPARATOR
        begins[1:] &= ~(joins[1:] & joins[:-1])
        ends = classes != SEPARATOR
        ends[:-1] &= ~(joins[1:] & joins[:-1])
        self.starts: Positions = np.flatnonzero(begins)
        self.ends: Positions = np.flatnonzero(ends) + 1
        self.hashes = _hash_spans(self.codes, self.starts, self.ends)
        self._windows: Windows | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def lengths(self) -> Positions:
        """Characters of each word."""
        return self.ends - self.starts

    def ngrams(self, n: int) -> Words64:
        """One hash for each run of `n` words, in order; empty when there are fewer."""
        starts = np.arange(max(0, len(self) - n + 1))
        return mix64(self.windows().at(starts, starts + n), seed=n) if len(starts) else np.empty(0, np.uint64)

    def windows(self) -> "Windows":
        """Hashes of any run of words."""
        if self._windows is None:
            self._windows = Windows(self.hashes)
        return self._windows

    def share_of(self, kind: int) -> float:
        """Share of the words whose first character is of this class."""
        if not len(self):
            return 0.0
        return float(np.mean(self.classes[self.starts] == kind))

    def line_ends(self) -> npt.NDArray[np.bool_]:
        """For each word whether a line ends after it."""
        breaks = np.flatnonzero(self.codes == ord("\n"))
        following = np.append(self.starts[1:], len(self.codes) + 1)
        ended = np.searchsorted(breaks, following) > np.searchsorted(breaks, self.ends)
        ended[-1:] = True
        return ended


class Windows:
    """Hashes of any run of consecutive entries, each in constant time.

    With C the running sum of h_i B^i modulo 2^64, the run from i to j has (C_j - C_i) B^{-i}, the polynomial hash
    of its entries; B is odd, so its inverse exists.
    """

    def __init__(self, hashes: Words64) -> None:
        size = len(hashes)
        self._running = np.zeros(size + 1, np.uint64)
        np.cumsum(hashes * powers(_BASE, size), out=self._running[1:])
        self._inverses = powers(_INVERSE, size + 1)

    def at(self, starts: Positions, ends: Positions) -> Words64:
        """Hashes of the runs from each start to its end; equal runs of one length have equal hashes."""
        return (self._running[ends] - self._running[starts]) * self._inverses[starts]


def powers(base: int, size: int) -> Words64:
    """1, base, base^2, ... modulo 2^64."""
    factors = np.full(size, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


@cache
def character_classes() -> npt.NDArray[np.uint8]:
    """The class of every code point of the first two planes."""
    table = np.full(TABLE_SIZE, SEPARATOR, np.uint8)
    for code in range(TABLE_SIZE):
        category = unicodedata.category(chr(code))
        if category[0] in "LM":
            table[code] = LETTER
        elif category[0] == "N":
            table[code] = DIGIT
        elif category == "Sm":
            table[code] = OPERATOR
    for first, last in UNSPACED:
        block = table[first : last + 1]
        block[block == LETTER] = ALONE
    table[[ord(sign) for sign in OPERATORS]] = OPERATOR
    return table


def _hash_spans(codes: npt.NDArray[np.uint32], starts: Positions, ends: Positions) -> Words64:
    """A polynomial hash of each span's code points, scrambled."""
    if not len(starts):
        return np.empty(0, np.uint64)
    lengths = ends - starts
    longest = int(lengths.max())
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    flat = within + np.repeat(starts, lengths)
    terms = (codes[flat].astype(np.uint64) + np.uint64(1)) * powers(_BASE, longest)[within]
    sums = np.add.reduceat(terms, np.cumsum(lengths) - lengths)
    return mix64(sums, seed=1)
