"""Numbers about a text's form, computed once per document; policies decide by them, nothing here judges.

The signals are those of Gopher (arXiv 2112.11446, table A1), C4 (arXiv 1910.10683) and FineWeb (arXiv 2406.17557),
on our own words: a character is a word in scripts that write no spaces.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from pensar.data.hashing import Words64
from pensar.data.words import ALONE, LETTER, Words

STOP_WORDS = frozenset("the be to of and that have with".split())
BULLETS = ("•", "‣", "●", "- ", "* ", "– ", "◦")
LINKS = re.compile(r"https?://|www\.")
BOILERPLATE = ("enable javascript", "cookie policy", "terms of use", "privacy policy", "uses cookies")
TOP_NGRAMS = (2, 3, 4)
REPEATED_NGRAMS = (5, 6, 7, 8, 9, 10)
SHORT_LINE_CHARACTERS = 30
CHARACTERS_PER_WORD = 3
"""In scripts without spaces a run of `n` words is one of about so many times `n` characters."""


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a text's form; shares are between 0 and 1."""

    num_characters: int
    num_words: int
    num_lines: int
    mean_word_length: float
    unspaced_share: float
    """Words that are one character of a script without spaces."""
    alphabetic_share: float
    """Words that begin with a letter."""
    symbol_ratio: float
    """Number signs and ellipses per word."""
    num_stop_words: int
    """Different English stop words."""
    bullet_line_share: float
    ellipsis_line_share: float
    ended_line_share: float
    """Lines that end in punctuation of any script."""
    short_line_share: float
    longest_line: int
    repeated_line_share: float
    """Characters in lines that stood there before."""
    repeated_paragraph_share: float
    top_ngram_shares: tuple[float, ...]
    """Characters in the commonest run of 2, 3 and 4 words."""
    repeated_ngram_shares: tuple[float, ...]
    """Characters in runs of 5 to 10 words that stand there more than once."""
    link_ratio: float
    """Web addresses per word."""
    curly_braces: int
    has_lorem_ipsum: bool
    boilerplate_lines: int
    compression: float
    """Distinct words per word: low in lists of the same few."""


def signals_of(text: str) -> Signals:
    """Every signal of one text."""
    words = Words(text)
    lengths = words.lengths()
    num_words = len(words)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    lowered = text.lower()
    divisor = max(num_words, 1)
    unspaced_share = words.share_of(ALONE)
    unit = CHARACTERS_PER_WORD if unspaced_share > 0.5 else 1
    return Signals(
        num_characters=len(text),
        num_words=num_words,
        num_lines=len(lines),
        mean_word_length=float(lengths.mean()) if num_words else 0.0,
        unspaced_share=unspaced_share,
        alphabetic_share=words.share_of(LETTER) + unspaced_share,
        symbol_ratio=(text.count("#") + text.count("...") + text.count("…")) / divisor,
        num_stop_words=len(STOP_WORDS.intersection(lowered.split())),
        bullet_line_share=_share(lines, lambda line: line.startswith(BULLETS)),
        ellipsis_line_share=_share(lines, lambda line: line.endswith(("...", "…"))),
        ended_line_share=_share(lines, ends_as_sentence),
        short_line_share=_share(lines, lambda line: len(line) <= SHORT_LINE_CHARACTERS),
        longest_line=max(map(len, lines), default=0),
        repeated_line_share=_repeated_share(lines),
        repeated_paragraph_share=_repeated_share(
            [part.strip() for part in text.split("\n\n") if part.strip()]
        ),
        top_ngram_shares=tuple(top_ngram_share(words, n * unit) for n in TOP_NGRAMS),
        repeated_ngram_shares=repeated_ngram_shares(words, unit),
        link_ratio=len(LINKS.findall(lowered)) / divisor,
        curly_braces=text.count("{"),
        has_lorem_ipsum="lorem ipsum" in lowered,
        boilerplate_lines=sum(lowered.count(phrase) for phrase in BOILERPLATE),
        compression=len(np.unique(words.hashes)) / divisor,
    )


def top_ngram_share(words: Words, n: int) -> float:
    """Share of the words' characters that the commonest n-gram covers, if it occurs more than once."""
    grams = words.ngrams(n)
    if len(grams) < 2:
        return 0.0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    best = int(np.argmax(counts))
    if counts[best] < 2:
        return 0.0
    lengths = words.lengths()
    size = int(lengths[first[best] : first[best] + n].sum())
    return min(1.0, float(size * counts[best]) / float(lengths.sum()))


def ends_as_sentence(line: str) -> bool:
    """Whether the last character is punctuation: every script has its own full stop."""
    return unicodedata.category(line[-1])[0] == "P"


def repeated_ngram_shares(words: Words, unit: int = 1) -> tuple[float, ...]:
    """The shares for 5 to 10 words of `unit` entries; where no shorter run repeats, no longer one can."""
    shares: list[float] = []
    for n in REPEATED_NGRAMS:
        nothing_left = bool(shares) and shares[-1] == 0.0
        shares.append(0.0 if nothing_left else repeated_ngram_share(words, n * unit))
    return tuple(shares)


def repeated_ngram_share(words: Words, n: int) -> float:
    """Share of the words' characters inside n-grams that occur more than once, each character counted once."""
    grams = words.ngrams(n)
    if len(grams) < 2:
        return 0.0
    covered = _covered(_repeated(grams), n)
    lengths = words.lengths()
    return float(lengths[covered].sum()) / float(lengths.sum())


def _repeated(grams: Words64) -> npt.NDArray[np.bool_]:
    """Which entries stood there before; the first of each does not count."""
    order = np.argsort(grams, kind="stable")
    later = np.zeros(len(grams), np.bool_)
    later[order[1:]] = grams[order[1:]] == grams[order[:-1]]
    return later


def _covered(starts: npt.NDArray[np.bool_], n: int) -> npt.NDArray[np.bool_]:
    """Which words lie in a window of `n` that is marked at its start."""
    steps = np.zeros(len(starts) + n, np.int64)
    where = np.flatnonzero(starts)
    steps[where] += 1
    steps[where + n] -= 1
    return np.cumsum(steps)[:-1] > 0


def _share(lines: list[str], holds: Callable[[str], bool]) -> float:
    if not lines:
        return 0.0
    return sum(1 for line in lines if holds(line)) / len(lines)


def _repeated_share(parts: list[str]) -> float:
    """Share of the characters that lie in repetitions of an earlier part."""
    total = sum(map(len, parts))
    counts = Counter(parts)
    return sum(len(part) * (times - 1) for part, times in counts.items()) / total if total else 0.0
