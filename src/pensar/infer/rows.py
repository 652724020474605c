"""RunningRows: the running requests as arrays, one row each, so that a step costs no Python per row.

Everything about a token stands at its place in the text, which is the prompt and then the reply.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from pensar.infer.budget import ANSWER, NO_BUDGET, THINKING, Bools, Index, Thinking
from pensar.infer.queue import Entry, Resumed
from pensar.infer.request import Completion, FinishReason, Ints, Request, TopLogprobs
from pensar.infer.step import PAGE

if TYPE_CHECKING:
    from pensar.infer.constraint import Constraint
    from pensar.infer.stops import StopMatcher

FIELDS = np.dtype(
    [
        ("prompt", np.int64),  # tokens of the prompt
        ("total", np.int64),  # tokens of the text: prompt and reply
        ("computed", np.int64),  # of them in the cache; at least one is not
        ("reported", np.int64),  # tokens of the text that the caller has seen or knows
        ("limit", np.int64),  # tokens of the text at which it ends
        ("num_pages", np.int64),
        ("published", np.int64),  # full pages whose content other requests may share
        ("cached", np.int64),  # tokens of the prompt that were in the cache already
        ("phase", np.int64),
        ("reasoning", np.int64),
        ("budget", np.int64),
        ("top_k", np.int64),
        ("seed", np.uint64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("logprobs", np.bool_),
        ("every", np.bool_),  # logits of all its tokens are wanted
        ("plain", np.bool_),  # a piece of it is its tokens, each with one log-probability at most
        ("follows", np.bool_),  # waits for a row with the same prompt
        ("adapter", np.int64),
        ("priority", np.int64),
        ("user", np.int64),
        ("arrival", np.int64),
        ("deadline", np.float64),
    ],
    align=True,
)
NO_TOKEN = -1

Scalar = TypeVar("Scalar", bound=np.generic)


class RunningRows:
    """Rows 0..num-1 are running; a released row is filled by the last one."""

    def __init__(self, slots: int, thinking: Thinking | None, end_ids: tuple[int, ...]) -> None:
        self.num = 0
        self.requests: list[Request] = []
        self.index: dict[str, int] = {}
        """Row of each running request."""
        self.keys: list[list[bytes]] = []
        """Of each row the key that its first page follows, then those of its published pages."""
        self.constraints: list[Constraint | None] = []
        self.stops: list[StopMatcher | None] = []
        self.tops: list[list[TopLogprobs] | None] = []
        self.state = np.zeros(slots, FIELDS)
        self.tokens: Ints = np.zeros((slots, 0), np.int64)
        self.logprobs: npt.NDArray[np.float32] = np.zeros((slots, 0), np.float32)
        self.forced: Bools = np.zeros((slots, 0), np.bool_)
        self.versions: npt.NDArray[np.int32] = np.zeros((slots, 0), np.int32)
        self.pages: Ints = np.zeros((slots, 0), np.int64)
        self._stops: Ints = np.full((slots, max(len(end_ids), 1)), NO_TOKEN)
        self._end_ids = end_ids
        self._thinking = thinking

    def add(self, entry: Entry, keys: list[bytes], adapter: int, user: int) -> int:
        """A new last row; nothing of its text is in the cache yet."""
        request, prompt, row = entry.request, entry.prompt, self.num
        params = request.params
        self._widen(len(prompt) + params.max_tokens)
        state = self.state[row : row + 1]
        state["prompt"] = state["total"] = state["reported"] = len(prompt)
        state["limit"] = len(prompt) + params.max_tokens
        state["computed"] = state["num_pages"] = state["published"] = state["cached"] = state["reasoning"] = 0
        state["phase"] = ANSWER if self._thinking is None else self._thinking.phase_of(prompt)
        state["budget"] = NO_BUDGET if params.thinking_budget is None else params.thinking_budget
        for field in ("top_k", "seed", "temperature", "top_p", "min_p"):
            state[field] = getattr(params, field)
        state["logprobs"] = params.logprobs or params.top_logprobs > 0
        state["every"], state["follows"] = params.prompt_logprobs, False
        state["plain"] = not params.prompt_logprobs and not params.top_logprobs
        state["adapter"], state["user"], state["priority"] = adapter, user, request.priority
        state["arrival"], state["deadline"] = entry.arrival, entry.deadline
        self.tokens[row, : len(prompt)] = prompt
        self.forced[row] = False
        stops = (*(() if params.ignore_eos else self._end_ids), *params.stop_ids)
        self._stops = _widened(self._stops, len(stops), NO_TOKEN)
        self._stops[row] = NO_TOKEN
        self._stops[row, : len(stops)] = stops
        self.requests.append(request)
        self.index[request.id] = row
        self.keys.append(keys)
        self.constraints.append(entry.constraint)
        self.stops.append(entry.stops)
        self.tops.append([] if params.top_logprobs else None)
        self.num += 1
        if entry.resumed is not None:
            self._restore(row, entry.resumed)
        if entry.budget is not None:
            state["budget"] = entry.budget
        return row

    def resumed(self, row: int) -> Resumed:
        """What has to be kept of a row that is to go on later."""
        total = int(self.state["total"][row])
        start = int(self.state["prompt"][row])
        return Resumed(
            self.completion(row, "abort"),
            self.state[row].copy(),
            self.versions[row, start:total].copy(),
        )

    def stopped(self, rows: Index, ids: Ints) -> Bools:
        """Whether each id is one that ends its row's reply."""
        found: Bools = (ids[:, None] == self._stops[rows]).any(1)
        return found

    def append(self, rows: Index, ids: Ints, version: int) -> None:
        """One sampled token to the text of each of `rows`."""
        numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        at = self.state["total"][numbers]
        self.tokens[numbers, at] = ids
        self.versions[numbers, at] = version
        self.state["total"][numbers] = at + 1

    def append_forced(self, row: int, ids: Ints, version: int) -> int:
        """As many of `ids` as the limit allows, in place of what the model would have said; returns how many."""
        start = int(self.state["total"][row])
        count = min(len(ids), int(self.state["limit"][row]) - start)
        self.tokens[row, start : start + count] = ids[:count]
        self.forced[row, start : start + count] = True
        self.logprobs[row, start + 1 : start + count] = np.nan  # until they are computed
        self.versions[row, start : start + count] = version
        self.state["total"][row] = start + count
        return count

    def completion(
        self,
        row: int,
        reason: FinishReason,
        *,
        error: str | None = None,
        start: int | None = None,
        stop: int | None = None,
    ) -> Completion:
        """The reply of a row so far, or its part between two places of the text."""
        state, request = self.state[row], self.requests[row]
        prompt = int(state["prompt"])
        start = prompt if start is None else start
        stop = int(state["total"]) if stop is None else stop
        tops, first = self.tops[row] or [], self.first_top(row)
        # What the prompt's tokens get is known where anything of the reply is, and told with its first part.
        scored = request.params.prompt_logprobs and start == prompt < int(state["total"])
        return Completion(
            tokens=self.tokens[row, start:stop].tolist(),
            logprobs=self.logprobs[row, start:stop].tolist() if state["logprobs"] else [],
            forced=self.forced[row, start:stop].tolist(),
            finish_reason=reason,
            num_reasoning_tokens=int(state["reasoning"]),
            reasoning_left=self.thinking_left(np.asarray([row]))[0],
            num_cached_tokens=int(state["cached"]),
            version=int(self.versions[row, stop - 1]) if stop > prompt else 0,
            top_logprobs=tops[start - first : stop - first],
            prompt_logprobs=self.logprobs[row, :prompt].tolist() if scored else [],
            prompt_top_logprobs=[[], *tops[: prompt - first]] if scored and tops else [],
            stopped_at=self._stopped_at(row),
            error=error,
        )

    def first_top(self, row: int) -> int:
        """The first place of a row's text whose likeliest tokens are told, where they are."""
        return 1 if self.requests[row].params.prompt_logprobs else int(self.state["prompt"][row])

    def thinking_left(self, rows: Ints) -> list[int | None]:
        """What is left of each row's thinking budget; None without one."""
        if self._thinking is None:
            return [None] * len(rows)
        budget, reasoning = self.state["budget"][rows], self.state["reasoning"][rows]
        left = np.where(self.state["phase"][rows] <= THINKING, np.maximum(budget - reasoning, 0), 0)
        return [
            None if free else value for free, value in zip(budget == NO_BUDGET, left.tolist(), strict=True)
        ]

    def _stopped_at(self, row: int) -> int | None:
        matcher = self.stops[row]
        return None if matcher is None or matcher.match is None else matcher.match.begin

    def safe(self, row: int) -> int:
        """Tokens of a text that can be shown, whatever comes: none in which a stop string may have begun."""
        matcher = self.stops[row]
        if matcher is None:
            return int(self.state["total"][row])
        return int(self.state["prompt"][row]) + matcher.safe_tokens

    def text(self, row: int) -> Ints:
        """The tokens of a row, prompt and reply; a view."""
        return self.tokens[row, : int(self.state["total"][row])]

    def give_pages(self, row: int, pages: Sequence[int]) -> None:
        """More pages at the end of a row's."""
        self.deal_pages(np.asarray([row]), np.asarray([len(pages)]), pages)

    def deal_pages(self, rows: Ints, counts: Ints, pages: Sequence[int]) -> None:
        """So many more pages at the end of each row's; those of a row stand together in `pages`."""
        have = self.state["num_pages"][rows]
        at = np.arange(len(pages)) + np.repeat(have + counts - np.cumsum(counts), counts)
        self.pages[np.repeat(rows, counts), at] = pages
        self.state["num_pages"][rows] = have + counts

    def take_pages(self, row: int) -> list[int]:
        """All pages of a row, which has none of its text in the cache any more."""
        have = int(self.state["num_pages"][row])
        pages: list[int] = self.pages[row, :have].tolist()
        state = self.state[row : row + 1]
        state["num_pages"] = state["computed"] = state["published"] = 0
        del self.keys[row][1:]
        return pages

    def release(self, row: int) -> None:
        """Drops a row."""
        last = self.num - 1
        lists: tuple[list[Any], ...] = (self.requests, self.keys, self.constraints, self.stops, self.tops)
        del self.index[self.requests[row].id]
        if row != last:
            total, pages = int(self.state["total"][last]), int(self.state["num_pages"][last])
            self.state[row] = self.state[last]
            self._stops[row] = self._stops[last]
            for array in (self.tokens, self.logprobs, self.forced, self.versions):
                array[row, :total] = array[last, :total]
            self.forced[row, total:] = False
            self.pages[row, :pages] = self.pages[last, :pages]
            for values in lists:
                values[row] = values[last]
            self.index[self.requests[row].id] = row
        for values in lists:
            values.pop()
        self.num = last

    def _restore(self, row: int, resumed: Resumed) -> None:
        """The reply that a preempted request had."""
        reply, start = resumed.completion, int(self.state["prompt"][row])
        stop = start + len(reply.tokens)
        self.tokens[row, start:stop] = reply.tokens
        self.forced[row, start:stop] = reply.forced
        self.versions[row, start:stop] = resumed.versions
        if reply.logprobs:
            self.logprobs[row, start:stop] = reply.logprobs
        if reply.prompt_logprobs:
            self.logprobs[row, :start] = reply.prompt_logprobs
        for field in ("reported", "phase", "reasoning", "budget", "cached"):
            self.state[field][row] = resumed.state[field]
        self.state["total"][row] = stop
        # The prompt's own are known where anything of the reply is.
        self.state["every"][row] = bool(resumed.state["every"]) and stop == start
        if self.tops[row] is not None:
            self.tops[row] = [*reply.prompt_top_logprobs[1:], *reply.top_logprobs]
        # Log-probabilities of forced tokens may not have been computed yet.
        if np.isnan(reply.logprobs).any():
            self.state["every"][row] = True

    def _widen(self, length: int) -> None:
        self.tokens = _widened(self.tokens, length, 0)
        width = self.tokens.shape[1]
        self.logprobs = _widened(self.logprobs, width, 0)
        self.forced = _widened(self.forced, width, 0)
        self.versions = _widened(self.versions, width, 0)
        self.pages = _widened(self.pages, -(-width // PAGE), 0)


def _widened(array: npt.NDArray[Scalar], width: int, fill: int) -> npt.NDArray[Scalar]:
    """`array` with at least `width` columns."""
    if array.shape[1] >= width:
        return array
    wide = np.full((array.shape[0], max(width, 2 * array.shape[1])), fill, array.dtype)
    wide[:, : array.shape[1]] = array
    return wide
