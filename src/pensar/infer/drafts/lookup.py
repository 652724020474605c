"""Lookup: guesses copied from where the end of a text has stood before, in its prompt or its reply.

Good for code that is edited, answers that quote, and lists: it costs no model. Every text has an index from its n-grams
to their places, linked from the last to the first, as in LZ77; a step adds its own tokens to it.
"""

from collections.abc import Sequence

import numpy as np

from pensar.infer.drafts.proposer import Asked, States
from pensar.infer.request import Ints
from pensar.infer.rows import RunningRows

CANDIDATES = 8
"""Earlier places that are compared with the end of a text, the last first."""


class _Index:
    """One text's: `last` place behind each n-gram, and of each place the one before with the same n-gram."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._last: dict[bytes, int] = {}
        self._before: list[int] = [-1] * size
        """By place: of a place is the number of tokens up to it."""
        self._num = size

    def grow(self, text: Ints) -> None:
        """Takes in the tokens that were added; the place at the end is left out, as it must not find itself."""
        size, begin = self._size, self._num - self._size
        data = text[begin:].tobytes()
        for place in range(self._num, len(text)):
            key = data[8 * (place - size - begin) : 8 * (place - begin)]
            self._before.append(self._last.get(key, -1))
            self._last[key] = place
        self._num = max(self._num, len(text))

    def find(self, text: Ints, most: int) -> tuple[int, int]:
        """The place behind the longest ending of `text` that stood there before, and its length up to `most`."""
        best, length = -1, 0
        place = self._last.get(text[len(text) - self._size :].tobytes(), -1)
        for _ in range(CANDIDATES):
            if place < 0:
                break
            limit = min(most, place)
            same = text[place - limit : place] == text[len(text) - limit :]
            wrong = np.flatnonzero(~same)
            matched = limit if not len(wrong) else limit - 1 - int(wrong[-1])
            if matched > length:
                best, length = place, matched
            if length == most:
                break
            place = self._before[place]
        return best, length


class Lookup:
    """Looks for the last `longest` to `shortest` tokens; `per_match` guesses for each token that was found equal.

    The longest match wins, of equally long ones the last.
    """

    wants_states = False

    def __init__(self, *, shortest: int = 2, longest: int = 16, per_match: int = 2) -> None:
        self._shortest, self._longest, self._per_match = shortest, longest, per_match
        self._indices: dict[str, _Index] = {}

    def propose(self, asked: Asked) -> list[Ints]:
        guesses = []
        for row, count in zip(asked.chosen.tolist(), asked.counts.tolist(), strict=True):
            text = asked.rows.text(row)
            index = self._indices.setdefault(asked.rows.requests[row].id, _Index(self._shortest))
            index.grow(text)
            guesses.append(self._continued(text, index, count))
        return guesses

    def observe(self, rows: RunningRows, states: Sequence[States]) -> None:
        """Texts say all that there is to know."""

    def forget(self, name: str) -> None:
        self._indices.pop(name, None)

    def _continued(self, text: Ints, index: _Index, count: int) -> Ints:
        if len(text) <= self._shortest:
            return np.zeros(0, np.int64)
        place, length = index.find(text, self._longest)
        if place < 0:
            return np.zeros(0, np.int64)
        # A text that repeats itself up to its end goes on repeating.
        ahead = np.arange(min(count, self._per_match * length)) % (len(text) - place)
        return text[place + ahead]
