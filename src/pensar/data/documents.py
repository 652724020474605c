"""Documents on disk: Parquet shards, what was dropped beside what was kept, and a commit record for each shard.

A shard called `00000-000` is the files `documents-00000-000.parquet`, `dropped-00000-000.parquet` and, written
last, `counts-00000-000.json`. A shard without its counts is not done: a stage that was killed does it again.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from pensar.base.errors import DataError
from pensar.base.files import write_atomic
from pensar.base.stage import Counts, Runtime
from pensar.text.document import Document

TEXT_COLUMNS = ("id", "text", "source", "locator", "kind", "language")
MARKS = "marks"
REASON = "reason"


class Dropped(NamedTuple):
    """A document that goes no further, and why, in snake case."""

    document: Document
    reason: str


@dataclass
class Judged:
    """What became of the documents of one shard."""

    kept: list[Document] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    counts: Counts = field(default_factory=dict)
    """Further numbers of the stage; nested dictionaries of numbers are added up over shards."""

    def drop(self, document: Document, reason: str) -> None:
        """Puts the document aside with its reason."""
        self.dropped.append(Dropped(document, reason))


def map_shards(
    source: Path,
    out: Path,
    runtime: Runtime,
    description: str,
    judge: Callable[[list[Document]], Judged],
) -> Counts:
    """Applies `judge` to every shard of `source` that `out` has not finished yet; returns the counts of all.

    Raises DataError when `source` has no shards or when nothing is left.
    """
    stems = list_shards(source)
    with runtime.progress.track(description, len(stems), unit="shard") as track:
        for stem in stems:
            if not is_done(out, stem):
                documents = read_shard(source, stem)
                write_judged(out, stem, documents, judge(documents))
            track.advance()
    counts = total_counts(out)
    if counts["documents_out"] == 0:
        reasons = (
            ", ".join(f"{reason} {num}" for reason, num in counts["dropped"].items()) or "no document came in"
        )
        raise DataError(
            f"{description} left none of {counts['documents_in']} documents ({reasons}); "
            "look at the dropped-*.parquet files of this stage and loosen what dropped them"
        )
    return counts


def write_judged(out: Path, stem: str, documents: Sequence[Document], judged: Judged) -> None:
    """Writes the files of one finished shard, its counts last."""
    write_table(out / f"documents-{stem}.parquet", documents_table(judged.kept))
    write_table(out / f"dropped-{stem}.parquet", dropped_table(judged.dropped))
    commit(out, stem, tally(documents, judged))


def tally(documents: Iterable[Document], judged: Judged) -> Counts:
    """The counts that every stage reports under the same names; bytes are UTF-8 bytes of text."""
    sizes_in = [len(document.text.encode("utf-8", "replace")) for document in documents]
    counts: Counts = {
        "documents_in": len(sizes_in),
        "documents_out": len(judged.kept),
        "bytes_in": sum(sizes_in),
        "bytes_out": sum(len(document.text.encode("utf-8", "replace")) for document in judged.kept),
        "dropped": dict(Counter(dropped.reason for dropped in judged.dropped)),
        "languages": dict(Counter(document.language for document in judged.kept)),
        "sources": dict(Counter(document.source for document in judged.kept)),
        "kinds": dict(Counter(document.kind for document in judged.kept)),
    }
    return {**counts, **judged.counts}


# ---------------------------------------------------------------- shards


def list_shards(folder: Path, prefix: str = "documents") -> list[str]:
    """Names of the shards of an artifact, in order."""
    stems = sorted(path.stem.removeprefix(f"{prefix}-") for path in folder.glob(f"{prefix}-*.parquet"))
    if not stems:
        raise DataError(f"{folder} has no {prefix}-*.parquet; run the stage that writes them first")
    return stems


def read_shard(folder: Path, stem: str) -> list[Document]:
    """The documents of one shard."""
    return documents_of(read_table(folder / f"documents-{stem}.parquet"))


def read_documents(folder: Path) -> Iterator[Document]:
    """Every document of an artifact, shard after shard."""
    for stem in list_shards(folder):
        yield from read_shard(folder, stem)


def read_dropped(folder: Path) -> Iterator[Dropped]:
    """Every document that the stage put aside, with its reason."""
    for path in sorted(folder.glob("dropped-*.parquet")):
        table = read_table(path)
        yield from map(Dropped, documents_of(table), table[REASON].to_pylist())


def commit(out: Path, stem: str, counts: Counts) -> None:
    """Declares a shard finished; its counts stand in the record."""
    write_atomic(out / f"counts-{stem}.json", msgspec.json.encode(counts, order="deterministic"))


def is_done(out: Path, stem: str) -> bool:
    """Whether the shard's commit record stands."""
    return (out / f"counts-{stem}.json").is_file()


def total_counts(out: Path) -> Counts:
    """The sum of all commit records; keys of nested dictionaries in alphabetical order."""
    total: Counts = {}
    for path in sorted(out.glob("counts-*.json")):
        add_counts(total, msgspec.json.decode(path.read_bytes()))
    return total


def add_counts(total: Counts, more: Mapping[str, Any]) -> None:
    """Adds numbers key by key, in place; text is kept from the first that has it."""
    for key, value in more.items():
        if isinstance(value, dict):
            nested = total.setdefault(key, {})
            add_counts(nested, value)
            total[key] = dict(sorted(nested.items()))
        elif isinstance(value, int | float):
            total[key] = total.get(key, 0) + value
        else:
            total.setdefault(key, value)


# ---------------------------------------------------------------- Parquet


def documents_table(documents: Sequence[Document]) -> pa.Table:
    """Documents as a table; marks are one column of JSON, so that every stage may add its own."""
    columns: dict[str, Any] = {
        name: pa.array([getattr(document, name) for document in documents], pa.string())
        for name in TEXT_COLUMNS
    }
    # Texts of one shard may exceed the 2 GiB that 32-bit offsets reach.
    columns["text"] = pa.array([document.text for document in documents], pa.large_string())
    marks = [msgspec.json.encode(document.marks, order="deterministic").decode() for document in documents]
    columns[MARKS] = pa.array(marks, pa.string())
    return pa.table(columns)


def dropped_table(dropped: Sequence[Dropped]) -> pa.Table:
    """Dropped documents as a table with the column `reason`."""
    table = documents_table([row.document for row in dropped])
    return table.append_column(REASON, pa.array([row.reason for row in dropped], pa.string()))


def documents_of(table: pa.Table) -> list[Document]:
    """The rows of a table that `documents_table` made."""
    columns = [table[name].to_pylist() for name in TEXT_COLUMNS]
    marks = [msgspec.json.decode(row) for row in table[MARKS].to_pylist()]
    return [
        Document(**dict(zip(TEXT_COLUMNS, values, strict=True)), marks=mark)
        for *values, mark in zip(*columns, marks, strict=True)
    ]


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a Parquet file atomically; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


def read_table(path: Path) -> pa.Table:
    """Reads a Parquet file; raises DataError when it is broken."""
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({error}); remove its stage's folder and run again"
        ) from error
