"""Readers of containers: one generator for each file format, yielding raw records and what could not be read."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from pensar.base.errors import ConfigError
from pensar.data.documents import Dropped
from pensar.data.hashing import document_id
from pensar.data.warc import read_warc_records
from pensar.text.document import Document

CODE_SUFFIXES = (
    "c cc cpp cs css cu cuh cxx f90 go h hpp hs java jl js json kt lua m ml php pl ps1 py pyi r rb rs scala sh sql "
    "swift toml ts tsx yaml yml zig"
).split()
SUFFIXES: Mapping[str, str] = {
    **{f".{suffix}": "code" for suffix in CODE_SUFFIXES},
    ".warc": "warc",
    ".wet": "warc",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".rst": "markdown",
}
MIMES = {
    "html": "text/html",
    "pdf": "application/pdf",
    "text": "text/plain",
    "markdown": "text/markdown",
    "code": "text/x-code",
}
FIELDS = ("title", "topic", "domain", "url", "id", "language")
"""Fields of a row, beside its text, that are kept as marks."""

NUM_QUOTED_CHARACTERS = 500


class Raw(msgspec.Struct, kw_only=True):
    """One record of a source before extraction."""

    id: str
    source: str
    locator: str
    kind: str = "text"
    mime: str
    content: bytes
    marks: dict[str, Any] = msgspec.field(default_factory=dict)
    """What the container says of it: url, charset, declared_language, title, license."""


Record = Raw | Dropped
Reader = Callable[[Path, str, str, str, int], Iterator[Record]]
"""`read(path, locator, source, text_field, max_bytes)`."""


def quarantined(source: str, locator: str, reason: str, marks: dict[str, Any], text: str = "") -> Dropped:
    """A record that could not be read, with its place, the reason and the beginning of its text."""
    name = document_id(source, locator)
    quoted = text[:NUM_QUOTED_CHARACTERS]
    return Dropped(Document(id=name, text=quoted, source=source, locator=locator, marks=marks), reason)


def read_warc(path: Path, locator: str, source: str, text_field: str, max_bytes: int) -> Iterator[Record]:
    """Pages of a WARC or WET file; a clipped member is kept as far as it goes, with the mark `truncated`."""
    del text_field
    for page in read_warc_records(path, max_bytes):
        place = f"{locator}#{page.number}" + (f" {page.url}" if page.url else "")
        if page.problem:
            found = {"bytes": page.size, "url": page.url, "error": page.detail}
            yield quarantined(source, place, page.problem, found)
            continue
        marks: dict[str, Any] = {"url": page.url}
        if page.charset:
            marks["charset"] = page.charset
        if page.truncated:
            marks["truncated"] = True
        name = document_id(source, place)
        yield Raw(id=name, source=source, locator=place, mime=page.mime, content=page.body, marks=marks)


def read_jsonl(path: Path, locator: str, source: str, text_field: str, max_bytes: int) -> Iterator[Record]:
    """Rows of JSON Lines, plain or compressed; a bad row costs that row only."""
    number = 0
    try:
        with open_stream(path) as stream:
            for number, line, size in bounded_lines(stream, max_bytes):
                place = f"{locator}#{number}"
                if size > max_bytes:
                    text = line[:NUM_QUOTED_CHARACTERS].decode("utf-8", "replace")
                    yield quarantined(source, place, "too_large", {"bytes": size, "limit": max_bytes}, text)
                elif line.strip():
                    yield _json_row(line, place, source, text_field)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        yield quarantined(source, f"{locator}#{number + 1}", "clipped_file", {"error": str(error)})


def read_parquet(path: Path, locator: str, source: str, text_field: str, max_bytes: int) -> Iterator[Record]:
    """Rows of a Parquet file."""
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if text_field in names:
            columns = [name for name in (text_field, *FIELDS) if name in names]
            batches = file.iter_batches(batch_size=1024, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield _row(row, f"{locator}#{number}", source, text_field, max_bytes)
            return
    except (pa.ArrowException, OSError) as error:
        yield quarantined(
            source, locator, "broken_parquet", {"error": str(error), "bytes": path.stat().st_size}
        )
        return
    raise ConfigError(
        f"source {source!r}: {path} has no column {text_field!r} but {', '.join(names)}; set text_field to one of them"
    )


def _read_file(form: str) -> Reader:
    def read(path: Path, locator: str, source: str, text_field: str, max_bytes: int) -> Iterator[Record]:
        del text_field
        size = path.stat().st_size
        if size > max_bytes:
            with path.open("rb") as file:
                head = file.read(NUM_QUOTED_CHARACTERS).decode("utf-8", "replace")
            yield quarantined(source, locator, "too_large", {"bytes": size, "limit": max_bytes}, head)
            return
        name = document_id(source, locator)
        yield Raw(id=name, source=source, locator=locator, mime=MIMES[form], content=path.read_bytes())

    return read


READERS: Mapping[str, Reader] = {
    "warc": read_warc,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    **{form: _read_file(form) for form in MIMES},
}
"""Format -> its reader; formats where a file is a document share one."""


@contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that may be compressed by gzip, Zstandard or bzip2, going by its suffix."""
    if path.suffix == ".gz":
        with gzip.open(path) as unzipped:
            yield unzipped  # type: ignore[misc]
    elif path.suffix in {".zst", ".bz2"}:
        with pa.input_stream(str(path), compression="zstd" if path.suffix == ".zst" else "bz2") as source:
            yield io.BufferedReader(source)
    else:
        with path.open("rb") as file:
            yield file


def bounded_lines(stream: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes, int]]:
    """Lines as (number from 1, bytes, size); of a line longer than `max_bytes` only the beginning is held."""
    number = 0
    while line := stream.readline(max_bytes + 1):
        number += 1
        size = len(line)
        piece = line
        while len(piece) and not piece.endswith(b"\n") and size > max_bytes:
            piece = stream.readline(1 << 20)
            size += len(piece)
        yield number, line, size


def _json_row(line: bytes, place: str, source: str, text_field: str) -> Record:
    errors = 0
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        repaired = line.decode("utf-8", "replace")
        errors = repaired.count("�")
        try:
            row = msgspec.json.decode(repaired)
        except msgspec.DecodeError:
            return quarantined(source, place, "bad_json", {"error": str(error), "bytes": len(line)}, repaired)
    record = _row(row, place, source, text_field, len(line) * 6)
    if errors and isinstance(record, Raw):
        record.marks["invalid_characters"] = errors
    return record


def _row(row: Any, place: str, source: str, text_field: str, max_bytes: int) -> Record:
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        shown = list(row) if isinstance(row, dict) else type(row).__name__
        return quarantined(source, place, "no_text_field", {"wanted": text_field, "found": str(shown)[:200]})
    content = text.encode("utf-8", "replace")
    if len(content) > max_bytes:
        return quarantined(source, place, "too_large", {"bytes": len(content), "limit": max_bytes}, text)
    marks = {
        name: row[name]
        for name in FIELDS
        if isinstance(row.get(name), str | int | float) and name != text_field
    }
    if "language" in marks:
        marks["declared_language"] = marks.pop("language")
    marks["charset"] = "utf-8"
    name = document_id(source, place)
    return Raw(id=name, source=source, locator=place, mime="text/plain", content=content, marks=marks)
