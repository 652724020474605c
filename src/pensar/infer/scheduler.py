"""Scheduler: which requests run, and which of their tokens the next step computes.

Every step has room for a number of tokens. Rows that add one token come first, so that no reply waits for a prompt;
what is left goes to the prompts, in chunks. A request is admitted when a slot is free and the pages for its text are;
when pages run out the least important row gives its own back and waits: its text is computed again when its turn
comes. Shape legend: R rows of a step, N tokens of all of them, S tokens whose logits are wanted.
"""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from pensar.infer.pages import PagePool
from pensar.infer.queue import OUTPUT_WEIGHT, Entry, WaitingQueue
from pensar.infer.request import Ints
from pensar.infer.rows import RunningRows
from pensar.infer.step import PAGE, Runner, StepBatch

MAX_LOGITS = 2**26
"""Logits of one step where those of all tokens of a chunk are wanted: 256 MiB."""
NO_ADAPTER = -1
NONE: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: of each of R running rows, in order, how many tokens are computed."""

    rows: Ints
    counts: Ints
    """[R], drafts included."""
    drafts: Ints
    """[R]: how many of them are guesses that stand behind the row's text."""
    wanted: Ints
    """[R]: of how many of the last of them logits are wanted."""
    plain: bool = False
    """Every running row adds one token of its text, and a token is drawn for each."""

    @classmethod
    def usual(cls, num: int) -> "Plan":
        """The plain one of `num` rows."""
        one = np.ones(num, np.int64)
        return cls(np.arange(num), one, np.zeros(num, np.int64), one, plain=True)

    def part(self, chosen: slice) -> "Plan":
        """Some of its rows."""
        return Plan(self.rows[chosen], self.counts[chosen], self.drafts[chosen], self.wanted[chosen])


class Scheduler:
    """Owns the queue, the rows and the pages; the engine decides what becomes of their tokens."""

    def __init__(
        self,
        runner: Runner,
        rows: RunningRows,
        pool: PagePool,
        *,
        slots: int,
        step_tokens: int,
        share: bool,
    ) -> None:
        self.runner, self.rows, self.pool = runner, rows, pool
        self.queue = WaitingQueue()
        self.slots, self.step_tokens, self.share = slots, step_tokens, share
        self.num_preempted = 0
        self.changed = True
        """Whether other rows run than when the engine last looked."""
        self.adapters: dict[str, int] = {}
        """The runner's number of each adapter."""
        self._plain = Plan.usual(0)
        self._reserved = 1
        if runner.lazy_room:  # growing later would copy what is stored, a quarter of a second for 160 MB
            with suppress(MemoryError):
                self.reserve(pool.num_pages - 1)
        self._leaders: dict[bytes, str] = {}
        """By root key and prompt, the row that is computing it."""
        self._followers: dict[str, list[str]] = {}

    # ------------------------------------------------------------ who runs

    def admit(self) -> None:
        """Moves requests from the queue to rows while there is room."""
        while (entry := self.queue.first()) is not None:
            leader = self._leader(entry)
            while not self._has_room(entry, leader):
                victim = self._least_important()
                if victim is None or self.rows.state["priority"][victim] <= entry.request.priority:
                    return
                self.preempt(victim)
                leader = self._leader(entry)
            self.queue.remove(entry.request.id)
            self._start(entry, leader)

    def preempt(self, row: int) -> None:
        """Sends a row back to the queue with what it has."""
        request, state = self.rows.requests[row], self.rows.state[row]
        prompt = self.rows.text(row)[: int(state["prompt"])].copy()
        entry = Entry(request, prompt, int(state["arrival"]), float(state["deadline"]))
        entry.constraint, entry.stops = self.rows.constraints[row], self.rows.stops[row]
        entry.resumed = self.rows.resumed(row)
        self.release(row)
        self.queue.push(entry)
        self.num_preempted += 1

    def release(self, row: int, *, broken: bool = False) -> None:
        """Drops a row and its pages; those of a broken one may hold NaN and are wiped."""
        self._abdicate(row)
        pages = self.rows.take_pages(row)
        if broken:
            own = [page for page in pages if self.pool.readers[page] == 1]
            self.pool.forget(own)
            if own:
                self.runner.wipe_pages(np.asarray(own))
        self.pool.release(pages)
        self.rows.release(row)
        self.changed = True

    def restart(self) -> None:
        """Everything in the cache is of other weights: all running texts are computed again."""
        for row in range(self.rows.num):
            self.pool.release(self.rows.take_pages(row))
        self.pool.forget_all()
        self.changed = True

    # ------------------------------------------------------------ what is computed

    def plan(self, drafts: Ints | None = None) -> Plan:
        """The next step; empty when nothing runs. `drafts` [rows] stand behind the texts of rows that are complete."""
        if drafts is None and (usual := self._usual()) is not None:
            return usual
        while True:
            counts = self._counts(drafts)
            rows = np.flatnonzero(counts)
            need = self._pages_needed(rows, counts[rows])
            short = int(need.sum()) - self.pool.available
            if short <= 0 and len(rows):
                break
            if self.rows.num == 0:
                break
            if short > 0 and drafts is not None and drafts.any():
                drafts = None
                continue
            victim = self._least_important()
            assert victim is not None
            assert self.rows.num > 1, "a request that is alone always fits"
            self.preempt(victim)
            drafts = None
        self._give_pages(rows, need)
        state = self.rows.state
        guesses = np.zeros(len(rows), np.int64) if drafts is None else drafts[rows]
        complete = state["computed"][rows] + counts[rows] - guesses == state["total"][rows]
        wanted = np.where(complete, guesses + 1, 0)
        return Plan(rows, counts[rows], guesses, np.where(state["every"][rows], counts[rows], wanted))

    def batch(self, plan: Plan) -> StepBatch:
        """What the runner has to compute."""
        state, num = self.rows.state, len(plan.rows)
        computed = state["computed"][plan.rows]
        if plan.plain:
            starts = np.arange(num + 1)
            row_N, position_N, wanted_S = plan.rows, computed, starts[:-1]
        else:
            starts = np.zeros(num + 1, np.int64)
            np.cumsum(plan.counts, out=starts[1:])
            row_N = np.repeat(plan.rows, plan.counts)
            position_N = np.arange(starts[-1]) + np.repeat(computed - starts[:-1], plan.counts)
            ends = np.cumsum(plan.wanted)
            wanted_S = np.arange(ends[-1]) + np.repeat(starts[1:] - ends, plan.wanted)
        adapters = state["adapter"][plan.rows] if self.adapters else None
        lengths = computed + plan.counts
        return StepBatch(
            tokens_N=self.rows.tokens[row_N, position_N],
            positions_N=position_N,
            starts=starts,
            lengths_R=lengths,
            pages_RP=self.rows.pages[plan.rows, : -(-int(lengths.max()) // PAGE)],
            wanted_S=wanted_S,
            adapters_R=None if adapters is None or (adapters < 0).all() else adapters,
        )

    def computed(self, plan: Plan) -> None:
        """Notes that a step has been computed, drafts apart."""
        state, rows = self.rows.state, plan.rows
        if plan.plain:
            state = state[: len(rows)]
            self.queue.charge(state["user"], np.where(state["computed"] < state["prompt"], 1, OUTPUT_WEIGHT))
            state["computed"] += 1
            return
        counts = plan.counts - plan.drafts
        before = state["computed"][rows]
        state["computed"][rows] = before + counts
        in_prompt = np.maximum(np.minimum(state["prompt"][rows] - before, counts), 0)
        self.queue.charge(state["user"][rows], OUTPUT_WEIGHT * counts - (OUTPUT_WEIGHT - 1) * in_prompt)

    def publish(self) -> None:
        """Lets others share the pages that have become full."""
        if not self.share:
            return
        state = self.rows.state[: self.rows.num]
        for row in np.flatnonzero(state["computed"] >= (state["published"] + 1) * PAGE).tolist():
            keys = self.rows.keys[row]
            for number in range(int(state["published"][row]), int(state["computed"][row]) // PAGE):
                tokens = self.rows.tokens[row, number * PAGE : (number + 1) * PAGE]
                keys.append(self.pool.key(keys[-1], tokens))
                self.pool.publish(int(self.rows.pages[row, number]), keys[-1])
            state["published"][row] = int(state["computed"][row]) // PAGE

    def joined(self, leaders: Ints) -> tuple[Ints, Ints]:
        """Followers whose prompt has just been computed by one of `leaders`: their rows, and whom each follows
        as an index into `leaders`. They share its full pages and get a copy of the last."""
        rows: list[int] = []
        sources: list[int] = []
        if not self._leaders:
            return NONE, NONE
        for index, leader in enumerate(leaders.tolist()):
            name = self.rows.requests[leader].id
            prompt = self.rows.tokens[leader, : int(self.rows.state["prompt"][leader])]
            key = self.rows.keys[leader][0] + prompt.tobytes()
            if self._leaders.get(key) != name:  # one that has the same prompt behind it leads nobody
                continue
            del self._leaders[key]
            for follower in self._followers.pop(name, ()):
                row = self.rows.index[follower]
                self.rows.state["follows"][row] = False
                if self._join(leader, row):
                    rows.append(row)
                    sources.append(index)
        return np.asarray(rows, np.int64), np.asarray(sources, np.int64)

    def check(self) -> None:
        """Raises AssertionError unless the books of pages and rows agree; for tests."""
        self.pool.check()
        readers = np.zeros(self.pool.num_pages, np.int32)
        for row in range(self.rows.num):
            np.add.at(readers, self.rows.pages[row, : self.rows.state["num_pages"][row]], 1)
        assert (readers == self.pool.readers).all(), "a page has other readers than the rows that have it"
        numbers = [self.rows.index[request.id] for request in self.rows.requests]
        assert numbers == list(range(self.rows.num)), "rows and their index disagree"

    # ------------------------------------------------------------ inside

    def _usual(self) -> Plan | None:
        """The step that adds one token of its text to every row, if that is what the next one is and pages suffice."""
        num = self.rows.num
        state = self.rows.state[:num]
        total = state["total"]
        if (total - state["computed"] != 1).any() or (state["follows"] | state["every"]).any() or not num:
            return None
        short = np.flatnonzero(total > state["num_pages"] * PAGE)
        if len(short) > self.pool.available:
            return None
        if len(self._plain.rows) != num:
            self._plain = Plan.usual(num)
        self._give_pages(short, self._plain.counts[: len(short)])
        return self._plain

    def _counts(self, drafts: Ints | None) -> Ints:
        """Tokens to compute of every row: single ones first, the rest of the step for chunks by importance."""
        state = self.rows.state[: self.rows.num]
        pending = np.where(state["follows"], 0, state["total"] - state["computed"])
        single = pending == 1
        counts = np.where(single, 1 if drafts is None else 1 + drafts, 0)
        if single.all():
            return counts
        left = self.step_tokens - int(counts.sum())
        scored = max(1, MAX_LOGITS // self.runner.config.vocab_size)
        longer = np.flatnonzero(pending > 1)
        for row in longer[np.lexsort((state["arrival"][longer], state["priority"][longer]))].tolist():
            if left <= 0:
                break
            cap = min(int(pending[row]), left)
            if state["every"][row]:
                cap = min(cap, scored)
                scored -= cap
            counts[row] = cap
            left -= cap
        return counts

    def _pages_needed(self, rows: Ints, counts: Ints) -> Ints:
        """Further pages of each row."""
        after = self.rows.state["computed"][rows] + counts
        need: Ints = np.maximum(-(-after // PAGE) - self.rows.state["num_pages"][rows], 0)
        return need

    def _give_pages(self, rows: Ints, need: Ints) -> None:
        count = int(need.sum())
        if count:
            pages = self.pool.take(count)
            self.reserve(max(pages))
            self.rows.deal_pages(rows, need, pages)

    def reserve(self, page: int) -> None:
        """Sees to it that the runner has room for a page."""
        if page >= self._reserved:
            num_pages = min(self.pool.num_pages, max(2 * self._reserved, page + 1))
            self.runner.reserve(num_pages)
            self._reserved = num_pages

    def _has_room(self, entry: Entry, leader: str | None) -> bool:
        """A slot, and pages for the text beyond those that running rows will still need for theirs."""
        if self.rows.num == self.slots:
            return False
        if self.rows.num == 0:
            return True
        state = self.rows.state[: self.rows.num]
        promised = np.maximum(-(-(state["total"] + 1) // PAGE) - state["num_pages"], 0).sum()
        need = 1 if leader is not None else -(-(entry.num_tokens + 1) // PAGE)
        return bool(need + promised <= self.pool.available)

    def _least_important(self) -> int | None:
        """The row that gives way first: of the highest number of priority the one that came last."""
        if not self.rows.num:
            return None
        state = self.rows.state[: self.rows.num]
        return int(np.lexsort((state["arrival"], state["priority"]))[-1])

    def _root(self, entry: Entry) -> bytes:
        return self.pool.root(entry.request.adapter, entry.request.salt)

    def _leader(self, entry: Entry) -> str | None:
        """The request that is computing the same prompt."""
        if not self._leaders or entry.resumed is not None or entry.request.params.prompt_logprobs:
            return None
        return self._leaders.get(self._root(entry) + entry.prompt.tobytes())

    def _start(self, entry: Entry, leader: str | None) -> None:
        rows, request, root = self.rows, entry.request, self._root(entry)
        adapter = self.adapters[request.adapter] if request.adapter else NO_ADAPTER
        row = rows.add(entry, [root], adapter, self.queue.number(request.user))
        self.changed = True
        if leader is not None:
            rows.state["follows"][row] = True
            self._followers.setdefault(leader, []).append(request.id)
            return
        if entry.resumed is None and not request.params.prompt_logprobs:
            self._leaders[root + entry.prompt.tobytes()] = request.id
        if self.share and not rows.state["every"][row]:
            # At least the last token is computed: its logits are wanted.
            keys = self.pool.keys(root, rows.text(row)[:-1])
            pages = self.pool.match(keys)
            rows.give_pages(row, pages)
            rows.keys[row] += keys[: len(pages)]
            rows.state["published"][row] = len(pages)
            rows.state["computed"][row] = len(pages) * PAGE
            if entry.resumed is None:
                rows.state["cached"][row] = len(pages) * PAGE

    def _abdicate(self, row: int) -> None:
        """A row that others follow leaves before its prompt is computed: the first of them takes its place.

        One that follows is followed no more: its name may come back with another prompt.
        """
        name = self.rows.requests[row].id
        prompt = self.rows.tokens[row, : int(self.rows.state["prompt"][row])]
        key = self.rows.keys[row][0] + prompt.tobytes()
        leader = self._leaders.get(key)
        if leader is not None and self.rows.state["follows"][row]:
            self._followers[leader].remove(name)
        if leader != name:
            return
        del self._leaders[key]
        waiting = self._followers.pop(name, [])
        if waiting:
            self.rows.state["follows"][self.rows.index[waiting[0]]] = False
            self._leaders[key] = waiting[0]
            self._followers[waiting[0]] = waiting[1:]

    def _join(self, leader: int, row: int) -> bool:
        """Gives a follower its leader's prompt in the cache; False where no page is left for the copy."""
        rows, state = self.rows, self.rows.state
        length = int(state["prompt"][leader])
        full = length // PAGE
        if length % PAGE and not self.pool.available:
            return False
        shared = rows.pages[leader, :full].tolist()
        self.pool.share(shared)
        rows.give_pages(row, shared)
        if length % PAGE:
            [page] = self.pool.take(1)
            self.reserve(page)
            self.runner.copy_pages(rows.pages[leader, full : full + 1], np.asarray([page]))
            rows.give_pages(row, [page])
        rows.keys[row] = list(rows.keys[leader][: 1 + min(full, int(state["published"][leader]))])
        state["published"][row] = len(rows.keys[row]) - 1
        state["computed"][row] = length
        state["cached"][row] = length
        return True
