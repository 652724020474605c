"""Lengths: how many guesses pay, from what has been kept of earlier ones and from the time that passes take.

A further guess adds to a step's expected tokens the probability that it and all before it are kept, and costs its share
of the pass. The guesses of all rows are taken in the order of that probability as long as tokens per second rise, so a
large batch, whose passes grow with every token, gets fewer or none. Nothing of this changes a text.
Shape legend: A rows, K guesses of a row at most.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pensar.infer.request import Ints

Floats = npt.NDArray[np.float64]

MEMORY = 0.95
"""What a step counts against the one after it, for acceptance and for times: they look back about 20 steps."""
WEIGHT_OF_ALL = 4.0
"""Guesses that a request has to have had before its own acceptance counts as much as that of all."""
FIRST_RATE, FIRST_WEIGHT = 0.7, 4.0
"""Acceptance that is assumed before anything is known, and how many guesses that is worth."""
PROBE, LONGEST_PROBE, PROBE_LENGTH = 16, 256, 2
"""Steps without guesses before a request gets some all the same, twice as many each time; and how many it gets."""
OUTLIER = 3.0
"""Times are cut at so many times what was expected: a machine has other work."""


class LineFit:
    """seconds = fixed + each x, fitted to what was seen lately."""

    def __init__(self) -> None:
        self._sums: Floats = np.zeros(5)
        """Of 1, x, seconds, x^2 and x seconds, older ones counting less."""

    def add(self, x: float, seconds: float) -> None:
        if self._sums[0] >= 3:
            seconds = min(seconds, OUTLIER * max(self.at(x), 1e-9))
        self._sums *= MEMORY
        self._sums += np.array([1.0, x, seconds, x * x, x * seconds])

    @property
    def each(self) -> float:
        """Seconds of one more; 0 until different x have been seen."""
        weight, x, seconds, squares, products = self._sums.tolist()
        spread = weight * squares - x * x
        return max(0.0, (weight * products - x * seconds) / spread) if spread > 1e-6 * (1 + x * x) else 0.0

    def at(self, x: float) -> float:
        """Seconds expected, 0 before anything was seen."""
        return float(self.over(np.array([x], np.float64))[0])

    def over(self, x: Floats) -> Floats:
        """`at` of many."""
        weight, mean_x, seconds = self._sums[:3].tolist()
        if not weight:
            return np.zeros_like(x)
        expected: Floats = np.maximum(seconds / weight + self.each * (x - mean_x / weight), 0.0)
        return expected


class Lengths:
    """Chooses for each step how many guesses each row gets."""

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self.passes, self.drafting = LineFit(), LineFit()
        """Seconds of a pass by its tokens, and of the proposer by its longest row of guesses."""
        self._tried: Floats = np.full(max_drafts, FIRST_WEIGHT)
        self._kept: Floats = np.full(max_drafts, FIRST_WEIGHT * FIRST_RATE)
        """By place in the row of guesses, of those whose predecessors were kept."""
        self._own: dict[str, tuple[float, float]] = {}
        """Guesses of each request that were tried and that were kept."""
        self._idle: dict[str, tuple[int, int]] = {}
        """Steps since a request last had guesses, and the number at which it is probed."""

    def choose(self, names: Sequence[str], most: Ints, others: int, room: int, steps: int = 1) -> Ints:
        """Guesses [A] of each row: `most` of each at most, `room` of all; the pass has `others` more tokens.

        `steps` have been taken since the last choice.
        """
        chances_AK = np.cumprod(self._rates(names), axis=1)
        chances_AK[np.arange(self.max_drafts) >= most[:, None]] = 0.0
        order = np.argsort(-chances_AK, axis=None, kind="stable")
        order = order[: min(int(np.count_nonzero(chances_AK)), room)]
        row_M, place_M = np.divmod(order, self.max_drafts)
        gained = np.concatenate(([0.0], np.cumsum(chances_AK[row_M, place_M])))
        base = len(names) + others
        depth = np.concatenate(([0], np.maximum.accumulate(place_M + 1))) if len(order) else np.zeros(1)
        seconds = self.passes.over(base + np.arange(len(gained), dtype=np.float64))
        seconds = seconds + np.where(depth > 0, self.drafting.over(depth.astype(np.float64)), 0.0)
        best = int(np.argmax((base + gained) / np.maximum(seconds, 1e-9)))
        counts = np.bincount(row_M[:best], minlength=len(names))
        return self._probed(names, counts, most, room - best, steps)

    def learn(self, name: str, tried: int, kept: int) -> None:
        """Of `tried` guesses the first `kept` were kept."""
        seen = min(tried, kept + 1)
        self._tried[:seen] = self._tried[:seen] * MEMORY + 1
        self._kept[:seen] *= MEMORY
        self._kept[:kept] += 1
        before = self._own.get(name, (0.0, 0.0))
        self._own[name] = MEMORY * before[0] + seen, MEMORY * before[1] + kept

    def forget(self, name: str) -> None:
        self._own.pop(name, None)
        self._idle.pop(name, None)

    def _rates(self, names: Sequence[str]) -> Floats:
        """[A, K] the probability of each guess where all before it are kept."""
        common_K = self._kept / self._tried
        own = np.array([self._own.get(name, (0.0, 0.0)) for name in names])
        rates: Floats = (own[:, 1:] + WEIGHT_OF_ALL * common_K) / (own[:, :1] + WEIGHT_OF_ALL)
        return rates

    def _probed(self, names: Sequence[str], counts: Ints, most: Ints, room: int, steps: int) -> Ints:
        """A few guesses for those that have had none for long: texts change."""
        for row in np.flatnonzero(counts == 0).tolist():
            idle, limit = self._idle.get(names[row], (0, PROBE))
            if idle + steps < limit or not most[row]:
                self._idle[names[row]] = idle + steps, limit
            elif room >= PROBE_LENGTH:
                self._idle[names[row]] = 0, min(2 * limit, LONGEST_PROBE)
                counts[row] = min(PROBE_LENGTH, int(most[row]))
                room -= PROBE_LENGTH
        for row in np.flatnonzero(counts).tolist():
            if counts[row] > PROBE_LENGTH:
                self._idle.pop(names[row], None)
        return counts
