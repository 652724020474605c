"""Files: whole or absent, stable digests and seeds, rows with line numbers, and a clear word on a full disk."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pensar.base.errors import DataError, RunError
from pensar.base.files import (
    atomic_path,
    disk_full_explained,
    files_under,
    is_disk_full,
    read_jsonl,
    seed_of,
    sha256,
    sweep_partial,
    write_atomic,
    write_jsonl,
)


class Row(msgspec.Struct):
    id: int
    text: str = ""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def file_limit() -> Iterator[int]:
    """No file of this process may grow beyond 64 KiB: a real refusal by the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield 65536
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "first")
    write_atomic(path, b"second \xff")
    assert path.read_bytes() == b"second \xff"
    assert names(path.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def write() -> None:
        with atomic_path(path) as partial:
            partial.write_text("new")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_full_disk_is_explained_with_bytes(tmp_path: Path, file_limit: int) -> None:
    with pytest.raises(
        RunError, match=r"disk full while writing .*big\.bin .* bytes free, 100,000 bytes needed; free some"
    ):
        write_atomic(tmp_path / "big.bin", bytes(100_000))
    assert names(tmp_path) == []


def test_a_full_disk_is_recognised_behind_other_errors() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    wrapped = ValueError("writer failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.ENOENT, "gone"))


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_full_explained(tmp_path):
        (tmp_path / "gone").read_text()


def test_partial_files_are_swept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".x.partial").write_text("torn")
    (tmp_path / "a" / "x").write_text("whole")
    sweep_partial(tmp_path)
    assert list(files_under(tmp_path)) == ["a/x"]


def test_digest_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 100_000)
    assert sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_seeds_are_stable_and_tell_parts_apart() -> None:
    text = b"str:s1\x1fint:3"
    assert seed_of("s1", 3) == int.from_bytes(hashlib.sha256(text).digest()[:8], "big") // 2
    assert (
        len(
            {
                seed_of("a", "b"),
                seed_of("ab"),
                seed_of("b", "a"),
                seed_of("a", "b", 0),
                seed_of("1"),
                seed_of(1),
            }
        )
        == 6
    )
    assert 0 <= seed_of("x") < 2**63
    other = subprocess.run(
        [sys.executable, "-c", "from pensar.base.files import seed_of; print(seed_of('s1', 3))"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "77"},
    )  # fmt: skip
    assert int(other.stdout) == seed_of("s1", 3)


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [Row(1, "olá\nmundo"), Row(2)]
    assert write_jsonl(path, iter(rows)) == 2
    assert len(path.read_bytes().splitlines()) == 2
    assert list(read_jsonl(path, Row)) == rows


@pytest.mark.parametrize("line", [b'{"id": "x"}', b'{"id": 1, "text": "\xff"}', b'{"id": 1', b"[]"])
def test_a_bad_row_is_named_by_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not a row of Row"):
        list(read_jsonl(path, Row))
