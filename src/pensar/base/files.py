"""Files that are whole or absent: atomic writes, digests, JSON lines, and a clear word when the disk is full."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pensar.base.errors import DataError, RunError

PARTIAL_SUFFIX = ".partial"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
T = TypeVar("T")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes `path` beside itself and renames, so that a reader or a crash sees the old file or the whole new one."""
    content = data.encode("utf-8") if isinstance(data, str) else data
    with atomic_path(path, len(content)) as partial:
        partial.write_bytes(content)


@contextmanager
def atomic_path(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A path beside `path` to be written by any library; renamed onto it at the end, removed on an error.

    `needed` is the size in bytes, when known, for the message of a full disk. A killed process leaves
    `.<name>.partial`, which the pipeline sweeps away before it goes on.
    """
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        with disk_full_explained(path, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sweep_partial(folder: Path) -> None:
    """Removes what killed writers left unfinished under `folder`."""
    for partial in folder.rglob(f".*{PARTIAL_SUFFIX}"):
        partial.unlink(missing_ok=True)


@contextmanager
def disk_full_explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns "no space left" from anything inside into a RunError with the free and the needed bytes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError) or not is_disk_full(error):
            raise
        raise RunError(disk_full_message(path, error, needed)) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that disk, quota or file size limit is exhausted."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        # Native writers (safetensors, Arrow) report the system's text in errors of their own.
        if "No space left on device" in str(seen) or "File too large (os error" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def disk_full_message(path: Path, error: BaseException, needed: int | None = None) -> str:
    """What to tell the user when `path` could not be written for want of space."""
    free = free_bytes(path)
    want = f"{needed:,} bytes needed" if needed is not None else "more needed"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (
        f"disk full while writing {path} ({reason}): {free:,} bytes free, {want}; "
        "free some space, or move the run with --root, and run the same command again: it goes on from here"
    )


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the disk of `path`, which need not exist yet."""
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_under(folder: Path) -> dict[str, Path]:
    """Every regular file below a folder by its relative POSIX path, sorted."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(found.items()))


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed that depends on the parts and their order only, the same in every process and version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file with their ends, but for a torn one that a kill in mid-write left; none without a file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Writes rows (structs, dictionaries, lists) one JSON value a line, atomically; returns how many."""
    encoder = msgspec.json.Encoder(order="deterministic")
    count = 0
    with atomic_path(path) as partial, partial.open("wb") as file:
        for row in rows:
            file.write(encoder.encode(row))
            file.write(b"\n")
            count += 1
    return count


def read_jsonl(path: Path, kind: type[T]) -> Iterator[T]:
    """The rows of a JSON Lines file as `kind`; raises DataError naming file and line for a row that is not one."""
    decoder = msgspec.json.Decoder(kind)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                yield decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path}:{number}: not a row of {kind.__name__}: {error}") from None
