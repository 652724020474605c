"""RunningRows: the running requests as arrays, one row each, so that a step costs no Python per row."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pensar.infer.budget import ANSWER, NO_BUDGET, NOT_FORCED, Bools, Thinking
from pensar.infer.request import Completion, FinishReason, Ints, Request

FIELDS = np.dtype(
    [
        ("position", np.int64),  # tokens in the cache, which is where the last token goes
        ("last", np.int64),  # the newest token, not yet in the cache
        ("length", np.int64),  # tokens of the reply
        ("reported", np.int64),  # tokens of the reply that the caller has seen
        ("max_tokens", np.int64),
        ("phase", np.int64),
        ("reasoning", np.int64),
        ("budget", np.int64),
        ("forced_at", np.int64),  # next place in the stop sentence
        ("top_k", np.int64),
        ("seed", np.uint64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("logprobs", np.int64),
    ]
)
NO_TOKEN = -1

Scalar = TypeVar("Scalar", bound=np.generic)


class RunningRows:
    """Rows 0..num-1 are running; a released row is filled by the last one."""

    def __init__(self, slots: int, thinking: Thinking | None, end_ids: tuple[int, ...]) -> None:
        self.num = 0
        self.requests: list[Request] = []
        self.prompts: list[Ints] = []
        self.state = np.zeros(slots, FIELDS)
        self.tokens: Ints = np.zeros((slots, 0), np.int64)
        self.logprobs: npt.NDArray[np.float32] = np.zeros((slots, 0), np.float32)
        self.forced: Bools = np.zeros((slots, 0), np.bool_)
        self._stops: Ints = np.full((slots, max(len(end_ids), 1)), NO_TOKEN)
        self._end_ids = end_ids
        self._thinking = thinking

    def add(self, request: Request, prompt: Ints) -> None:
        params, row = request.params, self.num
        state = self.state[row]
        state["position"], state["last"] = len(prompt), NO_TOKEN
        state["length"] = state["reported"] = state["reasoning"] = 0
        state["phase"] = ANSWER if self._thinking is None else self._thinking.phase_of(prompt)
        state["budget"] = NO_BUDGET if params.thinking_budget is None else params.thinking_budget
        state["forced_at"] = NOT_FORCED
        for field in ("max_tokens", "top_k", "seed", "temperature", "top_p", "min_p", "logprobs"):
            state[field] = getattr(params, field)
        stops = (*self._end_ids, *params.stop_ids)
        self._stops = _widened(self._stops, len(stops), NO_TOKEN)
        self._stops[row] = NO_TOKEN
        self._stops[row, : len(stops)] = stops
        self.tokens = _widened(self.tokens, params.max_tokens, 0)
        self.logprobs = _widened(self.logprobs, params.max_tokens, 0)
        self.forced = _widened(self.forced, params.max_tokens, 0)
        self.requests.append(request)
        self.prompts.append(prompt)
        self.num += 1

    def decide(self, rows: slice, ids: Ints) -> tuple[Ints, Bools, Bools]:
        """What the sampled ids of `rows` become: ids, which are forced, and which end their reply."""
        state = self.state[rows]
        forced = np.zeros(len(ids), np.bool_)
        if self._thinking is not None:
            ids, forced = self._thinking.force(state, ids)
        stopped: Bools = (ids[:, None] == self._stops[rows]).any(1) & ~forced
        if self._thinking is not None:
            self._thinking.count(state, ids, forced | stopped)
        return ids, forced, stopped

    def append(
        self, rows: slice, ids: Ints, forced: Bools, logprobs: npt.NDArray[np.float32] | None
    ) -> Bools:
        """Adds one token to each of `rows`; returns which replies are full."""
        state = self.state[rows]
        numbers, at = np.arange(rows.start, rows.stop), state["length"]
        self.tokens[numbers, at] = ids
        self.forced[numbers, at] = forced
        if logprobs is not None:
            self.logprobs[numbers, at] = logprobs
        state["last"] = ids
        state["length"] += 1
        full: Bools = state["length"] >= state["max_tokens"]
        return full

    def completion(
        self, row: int, reason: FinishReason, *, error: str | None = None, start: int = 0
    ) -> Completion:
        """The reply of a row so far, from its token `start` on."""
        state = self.state[row]
        length = int(state["length"])
        return Completion(
            tokens=self.tokens[row, start:length].tolist(),
            logprobs=self.logprobs[row, start:length].tolist() if state["logprobs"] else [],
            forced=self.forced[row, start:length].tolist(),
            finish_reason=reason,
            num_reasoning_tokens=int(state["reasoning"]),
            error=error,
        )

    def context(self, row: int) -> Ints:
        """The tokens of a row that the cache holds: prompt and reply without its newest token."""
        return np.concatenate((self.prompts[row], self.tokens[row, : int(self.state[row]["length"]) - 1]))

    def release(self, row: int) -> int:
        """Drops a row; returns the row that now has to move into its place in the cache (itself: none)."""
        last = self.num - 1
        if row != last:
            for array in (self.state, self.tokens, self.logprobs, self.forced, self._stops):
                array[row] = array[last]
            self.requests[row], self.prompts[row] = self.requests[last], self.prompts[last]
        self.requests.pop()
        self.prompts.pop()
        self.num = last
        return last


def _widened(array: npt.NDArray[Scalar], width: int, fill: int) -> npt.NDArray[Scalar]:
    """`array` with at least `width` columns."""
    if array.shape[1] >= width:
        return array
    wide = np.full((array.shape[0], max(width, 2 * array.shape[1])), fill, array.dtype)
    wide[:, : array.shape[1]] = array
    return wide
