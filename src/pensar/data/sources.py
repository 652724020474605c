"""The stage that reads anyone's files: WARC, HTML, PDF, JSON Lines, Parquet, code and plain text, as raw records.

Nothing is interpreted here beyond the container: bytes, where they came from, what they claim to be. What cannot
be read goes to `dropped-*.parquet` with its reason.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa

from pensar.base.config import Config
from pensar.base.errors import ConfigError, DataError
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import (
    Dropped,
    commit,
    dropped_table,
    is_done,
    read_table,
    total_counts,
    write_table,
)
from pensar.data.readers import READERS, SUFFIXES, Raw, quarantined

Format = Literal["auto", "warc", "html", "pdf", "jsonl", "parquet", "text", "code", "markdown"]
MAX_UNIT_FILES = 2_000
RAW_COLUMNS = ("id", "source", "locator", "kind", "mime")


class Source(Config, frozen=True, kw_only=True):
    """One origin of documents."""

    name: str
    path: str
    """A file, a folder (read with all below it) or a glob; `ROLE:rest` looks inside the input of that role."""
    format: Format = "auto"
    """`auto` goes by each file's suffix."""
    kind: Literal["auto", "text", "code", "task"] = "auto"
    """How its documents are judged and mixed; `auto` is code for code files and text for the rest."""
    license: str = "unknown"
    text_field: str = "text"
    """The field or column that holds the text, in JSON Lines and Parquet."""


class SourcesConfig(Config, frozen=True, kw_only=True):
    """What to read, and how large a piece may be."""

    sources: tuple[Source, ...] = ()
    max_document_bytes: int = 16 << 20
    """A larger record is put aside with the reason `too_large`, whatever it is: one line of 50 MB is no document."""
    shard_bytes: int = 32 << 20


def run(config: SourcesConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Writes raw-*.parquet; raises ConfigError for a path that is not there and DataError for an empty corpus."""
    if not config.sources:
        raise ConfigError("data.sources names no source; give at least one with a name and a path")
    names = Counter(source.name for source in config.sources)
    if max(names.values()) > 1:
        raise ConfigError(
            f"two sources are named {names.most_common(1)[0][0]!r}; ids rest on names, so rename one"
        )
    units = [unit for source in config.sources for unit in plan_units(source, inputs, config.shard_bytes)]
    with runtime.progress.track("reading sources", len(units), unit="unit") as track:
        for number, (source, files) in enumerate(units):
            stem = f"{number:05d}"
            if not is_done(out, stem):
                _read_unit(config, source, files, out, stem)
            track.advance()
    counts = total_counts(out)
    if not counts.get("documents_out"):
        reasons = ", ".join(f"{reason} {num}" for reason, num in counts.get("dropped", {}).items())
        raise DataError(
            f"the sources {', '.join(source.name for source in config.sources)} hold no readable document "
            f"({reasons or 'no file was found'}); point data.sources at files of a known format, or name the format"
        )
    return counts


def plan_units(
    source: Source, inputs: Mapping[str, Path], unit_bytes: int
) -> Iterator[tuple[Source, list[tuple[Path, str]]]]:
    """Groups a source's files, small ones together, as (source, [(path, locator)]); the order is by name."""
    unit: list[tuple[Path, str]] = []
    size = 0
    for path, locator in find_files(source, inputs):
        if unit and (size + path.stat().st_size > unit_bytes or len(unit) == MAX_UNIT_FILES):
            yield source, unit
            unit, size = [], 0
        unit.append((path, locator))
        size += path.stat().st_size
    if unit:
        yield source, unit


def find_files(source: Source, inputs: Mapping[str, Path]) -> Iterator[tuple[Path, str]]:
    """Files of a source with their names relative to its root; hidden files and caches are left out."""
    path = resolve(source, inputs)
    if path.is_file():
        yield path, path.name
        return
    if path.is_dir():
        root, found = path, path.rglob("*")
    else:
        fixed = list(_fixed_parts(path))
        root = Path(*fixed) if fixed else Path()
        pattern = str(path.relative_to(root)) if fixed else str(path)
        if len(fixed) == len(path.parts) or not root.is_dir():
            raise ConfigError(f"source {source.name!r}: {path} does not exist; correct its path")
        found = root.glob(pattern)
    files = []
    for file in found:
        relative = file.relative_to(root)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if file.is_file() and not hidden:
            files.append((relative.as_posix(), file))
    if not files and not path.is_dir():
        raise ConfigError(f"source {source.name!r}: {path} matches no file; correct its path")
    for name, file in sorted(files):
        yield file, name


def resolve(source: Source, inputs: Mapping[str, Path]) -> Path:
    """The path of a source, with `ROLE:` replaced by the folder of that input."""
    role, colon, rest = source.path.partition(":")
    if colon and role in inputs:
        return inputs[role] / rest
    return Path(source.path).expanduser()


def format_of(source: Source, path: Path) -> str | None:
    """The reader for a file, or None when its suffix says nothing."""
    if source.format != "auto":
        return source.format
    name = path.name.lower()
    for suffix in (".gz", ".zst", ".bz2"):
        name = name.removesuffix(suffix)
    return SUFFIXES.get(Path(name).suffix)


def raw_records(folder: Path, stem: str) -> Iterator[Raw]:
    """The records of one raw shard."""
    table = read_table(folder / f"raw-{stem}.parquet")
    columns = [table[name].to_pylist() for name in RAW_COLUMNS]
    for *values, content, marks in zip(
        *columns, table["content"].to_pylist(), table["marks"].to_pylist(), strict=True
    ):
        fields = dict(zip(RAW_COLUMNS, values, strict=True))
        yield Raw(**fields, content=content, marks=msgspec.json.decode(marks))


def _fixed_parts(path: Path) -> Iterator[str]:
    for part in path.parts:
        if any(sign in part for sign in "*?["):
            return
        yield part


def _read_unit(
    config: SourcesConfig, source: Source, files: Sequence[tuple[Path, str]], out: Path, stem: str
) -> None:
    """Reads a unit into as many raw shards as its size asks for; its commit record covers them all."""
    batch: list[Raw] = []
    dropped: list[Dropped] = []
    counts: Counts = {"documents_in": 0, "documents_out": 0, "bytes_in": 0, "bytes_out": 0, "sources": {}}
    size = part = 0
    for record in _records(config, source, files):
        counts["documents_in"] += 1
        if isinstance(record, Dropped):
            dropped.append(record)
            counts["bytes_in"] += record.document.marks.get("bytes", 0)
            continue
        batch.append(record)
        size += len(record.content)
        counts["bytes_in"] += len(record.content)
        counts["bytes_out"] += len(record.content)
        if size >= config.shard_bytes:
            write_table(out / f"raw-{stem}-{part:03d}.parquet", _raw_table(batch))
            batch, size, part = [], 0, part + 1
    write_table(out / f"raw-{stem}-{part:03d}.parquet", _raw_table(batch))
    write_table(out / f"dropped-{stem}.parquet", dropped_table(dropped))
    counts["documents_out"] = counts["documents_in"] - len(dropped)
    counts["dropped"] = dict(Counter(row.reason for row in dropped))
    counts["sources"] = {source.name: counts["documents_out"]}
    commit(out, stem, counts)


def _records(
    config: SourcesConfig, source: Source, files: Sequence[tuple[Path, str]]
) -> Iterator[Raw | Dropped]:
    for path, locator in files:
        form = format_of(source, path)
        if form is None:
            size = path.stat().st_size
            yield quarantined(source.name, locator, "unknown_format", {"suffix": path.suffix, "bytes": size})
            continue
        kind = source.kind if source.kind != "auto" else ("code" if form == "code" else "text")
        for record in READERS[form](path, locator, source.name, source.text_field, config.max_document_bytes):
            if isinstance(record, Raw):
                record.kind = kind
                record.marks = {**record.marks, "license": source.license, "format": form}
            yield record


def _raw_table(records: Sequence[Raw]) -> pa.Table:
    columns: dict[str, Any] = {
        name: pa.array([getattr(record, name) for record in records], pa.string()) for name in RAW_COLUMNS
    }
    columns["content"] = pa.array([record.content for record in records], pa.large_binary())
    marks = [msgspec.json.encode(record.marks, order="deterministic").decode() for record in records]
    columns["marks"] = pa.array(marks, pa.string())
    return pa.table(columns)
