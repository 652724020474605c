"""The stage that turns documents into token shards, and the reader of what it wrote.

A shard is `tokens-<stem>.bin` (uint16, or uint32 from 65,536 ids on, little endian) and `tokens-<stem>.idx` (int64:
where each document begins, then the end). `docs.parquet` lists every document in order with its place, cell and
weights, so that a token leads back to its document. `meta.json` names the tokenizer's digest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pensar.base.config import Config
from pensar.base.errors import DataError
from pensar.base.files import sha256, write_atomic
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import (
    commit,
    is_done,
    list_shards,
    read_shard,
    read_table,
    total_counts,
    write_table,
)
from pensar.text.document import Document
from pensar.text.tokenizer import TOKENIZER_FILE, Tokenizer

DOCS = "docs.parquet"
META = "meta.json"
BATCH = 256
UINT16_IDS = 1 << 16


class ShardsConfig(Config, frozen=True, kw_only=True):
    """Nothing to choose: documents, mixture and tokenizer decide everything."""


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What the shards are made of."""

    dtype: str
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    """The token after each document."""
    num_documents: int
    num_tokens: int
    mixtures: tuple[str, ...]
    stems: tuple[str, ...]


def run(config: ShardsConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `documents`, `mixture` and `tokenizer`; each document's tokens end with `<|endoftext|>`."""
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= UINT16_IDS else np.dtype("<u4")
    stems = list_shards(inputs["documents"])
    with runtime.progress.track("tokenising", len(stems), unit="shard") as track:
        for stem in stems:
            if not is_done(out, stem):
                documents = read_shard(inputs["documents"], stem)
                commit(out, stem, _write_tokens(documents, tokenizer, dtype, out, stem))
            track.advance()
    weights = read_weights(inputs["mixture"])
    write_table(out / DOCS, _docs_table(inputs["documents"], out, stems, weights))
    counts = total_counts(out)
    meta = Meta(
        dtype=dtype.name,
        tokenizer_sha256=sha256(inputs["tokenizer"] / TOKENIZER_FILE),
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.pad_id,
        num_documents=counts["documents_out"],
        num_tokens=counts["tokens"],
        mixtures=tuple(weights),
        stems=tuple(stems),
    )
    write_atomic(out / META, msgspec.json.format(msgspec.json.encode(meta), indent=2))
    return counts


class Shards:
    """Token shards, opened without being read: `tokens(i)` maps only what is asked for.

    Raises DataError for a folder that is none, for files that do not fit each other, and, when a tokenizer's
    folder is given, for a tokenizer other than the one that made the shards.
    """

    def __init__(self, folder: Path, tokenizer: Path | None = None) -> None:
        self.folder = folder
        self.meta = read_meta(folder)
        if tokenizer is not None:
            self.require_tokenizer(tokenizer)
        self._bins = [self._map(stem) for stem in self.meta.stems]
        indices = [np.fromfile(folder / f"tokens-{stem}.idx", "<i8") for stem in self.meta.stems]
        for stem, index, tokens in zip(self.meta.stems, indices, self._bins, strict=True):
            if not len(index) or index[-1] != len(tokens):
                raise DataError(
                    f"tokens-{stem}.bin of {folder} is clipped; remove the folder and run the stage again"
                )
        self._starts = np.concatenate([index[:-1] for index in indices])
        self._ends = np.concatenate([index[1:] for index in indices])
        self._shard = np.repeat(np.arange(len(indices)), [len(index) - 1 for index in indices])
        self.docs = read_table(folder / DOCS)
        """One row a document: doc_id, shard, start, end, source, language, kind, cell, weight_<mixture>."""
        if len(self._starts) != self.docs.num_rows:
            raise DataError(
                f"{folder / DOCS} lists {self.docs.num_rows} documents, the index {len(self._starts)}"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, its end included."""
        lengths: npt.NDArray[np.int64] = self._ends - self._starts
        return lengths

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> npt.NDArray[np.int32]:
        """Tokens of a document, or of the part from `start` to `end` of it."""
        first, last = int(self._starts[document]), int(self._ends[document])
        part = self._bins[int(self._shard[document])][first:last][start:end]
        return part.astype(np.int32)

    def weights(self, mixture: str) -> npt.NDArray[np.float64]:
        """Times that one pass over the mixture reads each document."""
        if mixture not in self.meta.mixtures:
            known = ", ".join(self.meta.mixtures)
            raise DataError(f"{self.folder} has no mixture {mixture!r}; it has {known}")
        return np.asarray(self.docs[f"weight_{mixture}"].to_numpy(), np.float64)

    def require_tokenizer(self, tokenizer: Path) -> None:
        """Raises DataError unless the tokenizer in this folder made the shards."""
        digest = sha256(tokenizer / TOKENIZER_FILE)
        if digest != self.meta.tokenizer_sha256:
            raise DataError(
                f"{tokenizer} has tokenizer {digest[:12]}, but the shards in {self.folder} were made with "
                f"{self.meta.tokenizer_sha256[:12]}; make them again with this tokenizer"
            )

    def _map(self, stem: str) -> npt.NDArray[Any]:
        path = self.folder / f"tokens-{stem}.bin"
        dtype = np.dtype(self.meta.dtype).newbyteorder("<")
        if not path.is_file():
            raise DataError(f"{path} is missing; remove the folder and run the stage again")
        if path.stat().st_size == 0:
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r", shape=(path.stat().st_size // dtype.itemsize,))


def read_meta(folder: Path) -> Meta:
    """The description of token shards; raises DataError when the folder holds none."""
    path = folder / META
    if not path.is_file():
        raise DataError(f"{folder} holds no token shards ({META} is missing); run the shards stage")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Meta)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{path} cannot be read ({error}); remove the folder and run the shards stage again"
        ) from None


def read_weights(folder: Path) -> dict[str, dict[str, tuple[float, str]]]:
    """Mixture -> document id -> (weight, cell)."""
    weights: dict[str, dict[str, tuple[float, str]]] = {}
    for path in sorted(folder.glob("mixture-*.parquet")):
        table = read_table(path)
        rows = zip(table["weight"].to_pylist(), table["cell"].to_pylist(), strict=True)
        weights[path.stem.removeprefix("mixture-")] = dict(zip(table["id"].to_pylist(), rows, strict=True))
    if not weights:
        raise DataError(f"{folder} holds no mixture-*.parquet; run the mixture stage")
    return weights


def _write_tokens(
    documents: list[Document], tokenizer: Tokenizer, dtype: np.dtype[Any], out: Path, stem: str
) -> Counts:
    pieces: list[npt.NDArray[Any]] = []
    ends = [0]
    languages: dict[str, dict[str, int]] = {}
    sources: dict[str, int] = {}
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        for document, ids in zip(batch, tokenizer.encode_batch([row.text for row in batch]), strict=True):
            pieces.append(np.array([*ids, tokenizer.pad_id], dtype))
            ends.append(ends[-1] + len(ids) + 1)
            entry = languages.setdefault(document.language, {"bytes": 0, "tokens": 0})
            entry["bytes"] += len(document.text.encode())
            entry["tokens"] += len(ids)
            sources[document.source] = sources.get(document.source, 0) + len(ids) + 1
    content = np.concatenate(pieces) if pieces else np.empty(0, dtype)
    write_atomic(out / f"tokens-{stem}.bin", content.tobytes())
    write_atomic(out / f"tokens-{stem}.idx", np.array(ends, "<i8").tobytes())
    size = sum(entry["bytes"] for entry in languages.values())
    return {
        "documents_in": len(documents),
        "documents_out": len(documents),
        "bytes_in": size,
        "bytes_out": content.nbytes,
        "dropped": {},
        "tokens": ends[-1],
        "tokens_by_source": sources,
        "fertility": languages,
    }


def _docs_table(
    source: Path, out: Path, stems: list[str], weights: dict[str, dict[str, tuple[float, str]]]
) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("doc_id", "shard", "start", "end", "source", "language", "kind", "domain", "cell")
    }
    columns |= {f"weight_{name}": [] for name in weights}
    any_mixture = next(iter(weights.values()))
    for stem in stems:
        index = np.fromfile(out / f"tokens-{stem}.idx", "<i8").tolist()
        for document, start, end in zip(read_shard(source, stem), index[:-1], index[1:], strict=True):
            if document.id not in any_mixture:
                raise DataError(
                    f"document {document.id} has no weight; the mixture was made from other documents"
                )
            row = (document.id, stem, start, end, document.source, document.language, document.kind)
            domain = str(document.marks.get("domain", ""))
            for name, value in zip(columns, (*row, domain, any_mixture[document.id][1]), strict=False):
                columns[name].append(value)
            for name, by_id in weights.items():
                columns[f"weight_{name}"].append(by_id[document.id][0])
    return pa.table(columns)
