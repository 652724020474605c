"""Seen: the tokens that a text has, counted, for penalties that touch these alone instead of the whole vocabulary."""

import numpy as np
import numpy.typing as npt

from pensar.infer.request import Ints, SamplingParams

Floats = npt.NDArray[np.float32]


class Seen:
    """The ids of a prompt, and those of its reply with their counts."""

    def __init__(self, prompt: Ints) -> None:
        ids = np.unique(prompt)
        self._num = self._num_prompt = len(ids)
        self._ids: Ints = np.concatenate((ids, np.zeros(64, np.int64)))
        self._counts: Floats = np.zeros(len(self._ids), np.float32)
        self._place = {token: place for place, token in enumerate(ids.tolist())}

    def add(self, token: int) -> None:
        """One more token of the reply."""
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = self._num
            self._num += 1
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token
        self._counts[place] += 1

    def remove(self, token: int) -> None:
        """Takes one back."""
        self._counts[self._place[token]] -= 1

    def penalties(self, params: SamplingParams) -> tuple[Ints, Floats, Floats]:
        """Ids, by what their positive logits are divided (and negative ones multiplied), and what is taken off.

        Repetition: Keskar et al. 2019 (arXiv 1909.05858), as transformers has it. Frequency and presence: as OpenAI's
        API has them.
        """
        counts = self._counts[: self._num]
        there = counts > 0
        taken = params.frequency_penalty * counts + params.presence_penalty * there
        there[: self._num_prompt] = True
        divisor = np.where(there, np.float32(params.repetition_penalty), np.float32(1))
        return self._ids[: self._num].copy(), divisor, taken.astype(np.float32)
