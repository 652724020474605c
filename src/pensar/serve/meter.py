"""Meter: writes what requests have used into an outbox; nothing that befalls the disk stops the server."""

import logging
import time

from pensar.base.errors import RunError
from pensar.infer.outbox import Outbox, UsageRecord
from pensar.serve.metrics import Counter, Gauge

log = logging.getLogger(__name__)

SECONDS_BETWEEN_WARNINGS = 60.0


class Meter:
    """One record for every request that the engine took, however it ended.

    A record is of a request and not of a sequence: a request is accounted for as a whole or not at all, under the id
    that its client has seen, and the record's numbers are those of `usage` in the reply: the prompt once, the tokens of
    all its sequences together (also of those that `best_of` or beam search throws away). It is in the outbox before
    the client has the end of its reply. A kill -9 loses what is not yet durable then, a small fraction of a second; as
    long as the disk takes nothing, records wait in memory, and are lost, counted and logged only when too many do.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._closed = False
        self._warned = -float("inf")
        self._lost = Counter("pensar_usage_lost_total", "Usage records that could not be kept.")
        self.metrics = (
            Gauge("pensar_usage_backlog", "Usage records that are not yet safe on the disk.", self._backlog),
            Gauge("pensar_usage_durable", "Number of the last usage record that is.", lambda: outbox.durable),
            Gauge("pensar_usage_failing", "1 while the disk takes no usage records.", self._failing),
            self._lost,
        )

    def write(self, record: UsageRecord) -> None:
        """Hands a record over; may be called from any thread and does not wait for the disk."""
        try:
            self._outbox.append(record)
        except RunError as error:
            self._lost.add()
            self._warn(f"the usage of request {record.id} is lost ({error}): {record}")
        else:
            if self._outbox.failure is not None:
                self._warn(f"usage records wait for the disk: {self._outbox.failure}")

    def close(self) -> None:
        """Writes what is left to the disk; what it does not take is counted and logged. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._outbox.close()
        except RunError as error:
            self._lost.add(self._backlog())
            log.error("%s", error)

    def _backlog(self) -> int:
        return self._outbox.last - self._outbox.durable

    def _failing(self) -> int:
        return int(self._outbox.failure is not None)

    def _warn(self, text: str) -> None:
        now = time.monotonic()
        if now - self._warned >= SECONDS_BETWEEN_WARNINGS:
            self._warned = now
            log.error("%s", text)
