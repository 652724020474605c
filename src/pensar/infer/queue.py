"""WaitingQueue: who is served next among the requests that wait.

The lower number of priority first; within a priority the user who has been served least (arXiv 2401.00588: a counter
of weighted tokens per user, lifted to the smallest of those who wait when a user comes back, so that idling earns
nothing); within a user the earlier deadline, then the earlier arrival.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from pensar.infer.request import Completion, FinishReason, Ints, Request, known_part

if TYPE_CHECKING:
    from pensar.infer.constraint import Constraint
    from pensar.infer.stops import StopMatcher

OUTPUT_WEIGHT = 2.0
"""Cost of a token of a reply in tokens of a prompt."""


@dataclass(eq=False, slots=True)
class Entry:
    """A request on its way to a row, or back from one that it had to leave."""

    request: Request
    prompt: Ints
    arrival: int
    deadline: float = math.inf
    """Time of the engine's clock at which it ends unserved."""
    budget: int | None = None
    """A thinking budget that was set after the request was submitted."""
    constraint: "Constraint | None" = None
    stops: "StopMatcher | None" = None
    resumed: "Resumed | None" = None
    """What it had when it was preempted."""
    live: bool = True
    """False once it has left the queue in another way than by its turn."""

    def ended(self, reason: FinishReason) -> Completion:
        """What it has so far, as its end."""
        if self.resumed is not None:
            return msgspec.structs.replace(known_part(self.resumed.completion), finish_reason=reason)
        return Completion(tokens=[], logprobs=[], forced=[], finish_reason=reason)

    @property
    def reported(self) -> int:
        """Tokens of the reply that the caller has."""
        return 0 if self.resumed is None else int(self.resumed.state["reported"]) - len(self.prompt)

    @property
    def num_tokens(self) -> int:
        """Tokens to compute before it can go on."""
        return len(self.prompt) + (0 if self.resumed is None else len(self.resumed.completion.tokens))


@dataclass(eq=False, slots=True)
class Resumed:
    """The reply so far of a preempted request, and the fields of its row."""

    completion: Completion
    state: npt.NDArray[np.void]
    versions: npt.NDArray[np.int32]


@dataclass(eq=False, slots=True)
class _User:
    waiting: list[tuple[float, int, Entry]] = field(default_factory=list)
    num_waiting: int = 0


class WaitingQueue:
    """`push`, look at `first`, `pop` it; `remove` takes one out of the middle."""

    def __init__(self) -> None:
        self._levels: dict[int, dict[int, _User]] = {}
        self._users: dict[str, int] = {}
        self._served: npt.NDArray[np.float64] = np.zeros(16)
        self._entries: dict[str, Entry] = {}
        # Names: an entry that has left is not kept until its time would have come, and comes again when it gave way.
        self._deadlines: list[tuple[float, int, str]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def push(self, entry: Entry) -> None:
        request = entry.request
        level = self._levels.setdefault(request.priority, {})
        number = self.number(request.user)
        if number not in level:
            # Whoever comes back after a pause begins with those who wait, not with the time it was away.
            if level:
                self._served[number] = max(self._served[number], self._served[list(level)].min())
            level[number] = _User()
        user = level[number]
        heapq.heappush(user.waiting, (entry.deadline, entry.arrival, entry))
        user.num_waiting += 1
        self._entries[request.id] = entry
        if entry.deadline < math.inf:
            heapq.heappush(self._deadlines, (entry.deadline, entry.arrival, request.id))

    def first(self) -> Entry | None:
        """The entry whose turn it is."""
        if not self._entries:
            return None
        level = self._levels[min(self._levels)]
        number = min(level, key=lambda user: (self._served[user], level[user].waiting[0][:2]))
        return level[number].waiting[0][2]

    def remove(self, name: str) -> Entry:
        """Takes an entry out, whether it is its turn or not; KeyError where there is none."""
        entry = self._entries.pop(name)
        entry.live = False
        request = entry.request
        level = self._levels[request.priority]
        number = self._users[request.user]
        user = level[number]
        user.num_waiting -= 1
        while user.waiting and not user.waiting[0][2].live:
            heapq.heappop(user.waiting)
        if not user.num_waiting:
            del level[number]
            if not level:
                del self._levels[request.priority]
        return entry

    def expired(self, now: float) -> list[Entry]:
        """Takes out the entries whose deadline has passed."""
        found = []
        while self._deadlines:
            deadline, arrival, name = self._deadlines[0]
            entry = self._entries.get(name)
            waits = entry is not None and entry.arrival == arrival
            if waits and deadline > now:
                break
            heapq.heappop(self._deadlines)
            if waits:
                found.append(self.remove(name))
        return found

    def number(self, user: str) -> int:
        """By which `charge` knows a user."""
        if user not in self._users:
            self._users[user] = len(self._users)
            if len(self._users) > len(self._served):
                self._served = np.concatenate((self._served, np.zeros_like(self._served)))
        return self._users[user]

    def charge(self, users: Ints, weighted_tokens: npt.NDArray[np.float64]) -> None:
        """Counts what the users with these numbers were served; one may occur several times."""
        self._served += np.bincount(users, weighted_tokens, len(self._served))

    def served(self, user: str) -> float:
        """Weighted tokens of a user so far."""
        return float(self._served[self.number(user)])
