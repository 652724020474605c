"""Stable 64-bit hashing of whole arrays, and the randomness that is derived from it."""

import numpy as np
import numpy.typing as npt
import xxhash

Words64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix64(values: npt.ArrayLike, seed: int = 0) -> Words64:
    """A bijective scrambling of 64-bit numbers (SplitMix64's finaliser); different seeds give unrelated results.

    The same on every platform and version of NumPy, which its own random generators do not promise.
    """
    offset = np.array([(seed * 0xD1342543DE82EF95 + 1) & 0xFFFFFFFFFFFFFFFF], np.uint64)
    x: Words64 = np.atleast_1d(np.asarray(values, np.uint64)) + offset * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    x ^= x >> np.uint64(31)
    return x


def uniform(values: npt.ArrayLike, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each value, from its hash."""
    return (mix64(values, seed) >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def permutation(size: int, seed: int) -> npt.NDArray[np.int64]:
    """The numbers 0..size-1 in an order that depends on `size` and `seed` only."""
    return np.argsort(mix64(np.arange(size, dtype=np.uint64), seed), kind="stable")


def contained(values: Words64, ordered: Words64) -> npt.NDArray[np.bool_]:
    """Which values are among `ordered`, an ascending array that is not touched (np.isin would sort it each time)."""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.equal(ordered[places], values)


def document_id(source: str, locator: str) -> str:
    """The id of a document: where it comes from, hashed to 128 bits."""
    return xxhash.xxh3_128_hexdigest(f"{source}\0{locator}".encode("utf-8", "surrogatepass"))


def text_digest(text: str) -> bytes:
    """128 bits of a text that ignores case and spacing."""
    return xxhash.xxh3_128_digest(" ".join(text.lower().split()).encode("utf-8", "replace"))
