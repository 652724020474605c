"""Outbox: what every finished request has used, written once to files that survive a crash at any moment.

A record's number counts from 1 and never changes. Files are named for their first number and are only appended to; a
line is a checksum and the record as JSON. A thread writes what has come since its last turn and syncs it to the disk
in one go, so a step of the engine never waits for the disk, and a thousand requests that end together cost one sync.
Then it notes the last number that is safe in the file `durable`, and readers look no further: a number that anybody
has seen never becomes another record. What a crash leaves behind that number is kept if it is whole, cut off if torn.
"""

import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import msgspec

from pensar.base.errors import ConfigError, DataError, RunError
from pensar.base.files import disk_full_message, is_disk_full, write_atomic
from pensar.base.lock import locked
from pensar.infer.request import Completion, FinishReason, Request

DURABLE = "durable"
CHECKSUM = 8
"""Hexadecimal digits before a line's JSON, and a space."""
RETRY_SECONDS = 1.0


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one request has used."""

    id: str
    user: str
    model: str
    adapter: str
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt's."""
    reasoning_tokens: int
    """Of the output's."""
    output_tokens: int
    finish_reason: FinishReason
    finished: float
    """Seconds since 1970."""
    version: int
    """Of the weights that drew the last token."""


def usage_of(
    request: Request, completion: Completion, model: str, finished: float | None = None
) -> UsageRecord:
    """The record of a request that has ended, now unless it is said when."""
    return UsageRecord(
        id=request.id,
        user=request.user,
        model=model,
        adapter=request.adapter,
        prompt_tokens=len(request.tokens),
        cached_tokens=completion.num_cached_tokens,
        reasoning_tokens=completion.num_reasoning_tokens,
        output_tokens=len(completion.tokens),
        finish_reason=completion.finish_reason,
        finished=time.time() if finished is None else finished,
        version=completion.version,
    )


class Outbox:
    """The writer of a folder, one at a time."""

    def __init__(
        self,
        folder: Path,
        *,
        commit_seconds: float = 0.02,
        file_bytes: int = 2**26,
        max_pending: int = 1_000_000,
    ) -> None:
        """Syncs at most once in `commit_seconds`, and begins a new file after `file_bytes`.

        While the disk takes nothing, `max_pending` records are kept in memory, and it is tried again. RunError where
        another process has the folder; DataError where a file is damaged elsewhere than at its end.
        """
        if file_bytes < 1 or max_pending < 1 or commit_seconds < 0:
            raise ConfigError(
                f"file_bytes {file_bytes}, max_pending {max_pending} and commit_seconds {commit_seconds} must be "
                "positive"
            )
        self.folder = Path(folder)
        self.failure: str | None = None
        """Why the disk takes nothing at present."""
        self._commit_seconds, self._file_bytes, self._max_pending = commit_seconds, file_bytes, max_pending
        self._stack = ExitStack()
        self._stack.enter_context(locked(self.folder))
        try:
            self._file, self._size, self._durable = _recovered(self.folder)
            _note(self.folder, self._durable)
        except BaseException:
            self._stack.close()
            raise
        self._last = self._durable
        self._pending: deque[UsageRecord] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._write, name="outbox", daemon=True)
        self._thread.start()

    @property
    def durable(self) -> int:
        """The last number that no crash can take away."""
        return self._durable

    @property
    def last(self) -> int:
        """The last number that was given out."""
        return self._last

    def append(self, record: UsageRecord) -> int:
        """Takes a record, to be written soon; returns its number. RunError where too many wait for the disk."""
        with self._changed:
            if self._closing:
                raise RunError("this outbox is closed; open another one on its folder")
            if len(self._pending) >= self._max_pending:
                raise RunError(
                    f"{len(self._pending):,} usage records wait for the disk, the limit is {self._max_pending:,}: "
                    f"{self.failure or 'it is too slow'}"
                )
            self._pending.append(record)
            self._last += 1
            if len(self._pending) == 1:
                self._changed.notify_all()
            return self._last

    def wait(self, number: int, timeout_seconds: float | None = None) -> bool:
        """Waits until the record of that number is safe; False where that has taken longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._durable >= number, timeout_seconds)

    def close(self) -> None:
        """Writes what is left. RunError where the disk does not take it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._stack.close()
        if self._pending:
            raise RunError(f"{len(self._pending):,} usage records could not be written: {self.failure}")

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _write(self) -> None:
        """The thread: one commit after the other."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                if not self._closing:
                    self._changed.wait_for(lambda: self._closing, self._commit_seconds)
                batch = list(self._pending)
            try:
                self._commit(batch)
            except OSError as error:
                full = is_disk_full(error)
                self.failure = disk_full_message(self._file, error) if full else f"{self._file}: {error}"
                with self._changed:
                    if self._closing:
                        return
                    self._changed.wait_for(lambda: self._closing, RETRY_SECONDS)
                continue
            self.failure = None
            with self._changed:
                for _ in batch:
                    self._pending.popleft()
                self._durable += len(batch)
                self._changed.notify_all()

    def _commit(self, batch: list[UsageRecord]) -> None:
        """Appends and syncs; after an error the file is as it was, or is made so by the next attempt."""
        if self._size >= self._file_bytes:
            self._file, self._size = _begun(self.folder, self._durable + 1), 0
        encoder = msgspec.json.Encoder()
        content = b"".join(_line(encoder.encode(record)) for record in batch)
        with self._file.open("r+b") as file:
            # What a failed attempt has left; after a failed sync nobody knows what of it is on the disk.
            file.truncate(self._size)
            file.seek(self._size)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _note(self.folder, self._durable + len(batch))
        self._size += len(content)


class Consumer:
    """A reader of a folder with a place of its own, in the writer's process or another one."""

    def __init__(self, folder: Path, name: str) -> None:
        if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
            raise ConfigError(f"the consumer's name {name!r} becomes a file's; use letters, digits, - and _")
        self.folder = Path(folder)
        self._cursor = self.folder / f"cursor-{name}"
        self._at: tuple[int, Path, int] | None = None
        """The number after which the next line stands, and where."""

    @property
    def acknowledged(self) -> int:
        """The last number that this consumer is done with, kept over crashes."""
        try:
            return int(self._cursor.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise DataError(
                f"{self._cursor} holds no number; write the last one that is done there"
            ) from error

    def read(self, after: int | None = None, limit: int = 1_000) -> list[tuple[int, UsageRecord]]:
        """Records with their numbers, the next ones after `after`, by default after what is acknowledged.

        Only what is safe on the disk. DataError where a file is damaged.
        """
        after = self.acknowledged if after is None else after
        last = min(_noted(self.folder), after + limit)
        found: list[tuple[int, UsageRecord]] = []
        if last <= after:
            return found
        if self._at is None or self._at[0] != after or not self._at[1].is_file():
            self._at = self._seek(after)
        number, path, offset = self._at
        decoder = msgspec.json.Decoder(UsageRecord)
        while number < last:
            for content, end in _lines(path, offset):
                number, offset = number + 1, end
                found.append((number, decoder.decode(content)))
                if number == last:
                    break
            if number < last:
                following = _named(self.folder, number + 1)
                if not following.is_file():
                    raise DataError(
                        f"{path} ends at record {number} and the outbox holds {last}; restore the file from a backup"
                    )
                path, offset = following, 0
        self._at = number, path, offset
        return found

    def acknowledge(self, number: int) -> None:
        """This consumer is done with all records up to `number`, whatever happens. ConfigError for one not yet safe."""
        last = _noted(self.folder)
        if not self.acknowledged <= number <= last:
            raise ConfigError(
                f"record {number} cannot be acknowledged; it must be from {self.acknowledged} to {last}"
            )
        write_atomic(self._cursor, str(number))

    def _seek(self, after: int) -> tuple[int, Path, int]:
        for first, path in reversed(_files(self.folder)):
            if first <= after + 1:
                number, offset = first - 1, 0
                for _, end in _lines(path, 0) if number < after else ():
                    number, offset = number + 1, end
                    if number == after:
                        break
                if number < after:
                    break
                return number, path, offset
        raise DataError(
            f"{self.folder} has no record {after}; it was deleted after all consumers were done, or is damaged"
        )


def prune(folder: Path) -> int:
    """Deletes the files that every consumer is done with, but for the last one; returns how many."""
    cursors = [Consumer(folder, path.name.removeprefix("cursor-")) for path in folder.glob("cursor-*")]
    if not cursors:
        return 0
    done = min(cursor.acknowledged for cursor in cursors)
    files = _files(folder)
    removed = 0
    for (_, path), (first_of_next, _) in pairwise(files):
        if first_of_next - 1 <= done:
            path.unlink()
            removed += 1
    return removed


# ---------------------------------------------------------------- files


def _line(content: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(content), content)


def _content(line: bytes) -> bytes | None:
    """The JSON of a line; None for one that is not whole."""
    content = line[CHECKSUM + 1 : -1]
    return content if line == _line(content) else None


def _lines(path: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """Each line's JSON from `offset` on, and where it ends; DataError for a damaged one."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            content = _content(line)
            if content is None:
                raise DataError(f"{path} is damaged at byte {offset:,}; restore it from a backup")
            offset += len(line)
            yield content, offset


def _named(folder: Path, first: int) -> Path:
    return folder / f"usage-{first:016}.jsonl"


def _files(folder: Path) -> list[tuple[int, Path]]:
    """First number and path of each file, in order."""
    return sorted((int(path.stem.removeprefix("usage-")), path) for path in folder.glob("usage-*.jsonl"))


def _begun(folder: Path, first: int) -> Path:
    """A new file, whose name is safe on the disk as well."""
    path = _named(folder, first)
    path.open("ab").close()
    _sync_names(folder)
    return path


def _recovered(folder: Path) -> tuple[Path, int, int]:
    """The file to append to, its size and the last number in it, after cutting off a torn end."""
    files = _files(folder)
    if not files:
        return _begun(folder, 1), 0, 0
    first, path = files[-1]
    number, size = first - 1, 0
    with path.open("r+b") as file:
        for line in file:
            if _content(line) is None:
                break
            number, size = number + 1, size + len(line)
        noted = _noted(folder)
        if number < noted:
            raise DataError(
                f"{path} is damaged at byte {size:,} and record {noted} was safe; restore it from a backup"
            )
        file.truncate(size)
        os.fsync(file.fileno())
    _sync_names(folder)
    return path, size, number


def _note(folder: Path, number: int) -> None:
    """Tells readers how far they may look. After a power cut the note may be an older one, which costs nothing."""
    descriptor = os.open(folder / DURABLE, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, _line(b"%016d" % number), 0)
    finally:
        os.close(descriptor)


def _noted(folder: Path) -> int:
    """What was noted last; 0 before the first time."""
    for _ in range(100):
        try:
            content = _content((folder / DURABLE).read_bytes())
        except FileNotFoundError:
            return 0
        if content is not None:
            return int(content)
        time.sleep(0.001)  # it is being written
    return 0


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
