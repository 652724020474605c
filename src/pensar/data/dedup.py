"""The stage that keeps one of each group of equal or nearly equal documents.

Equal: the same text but for case and spacing. Nearly equal: MinHash over runs of five words, banded so that pairs
above a similarity of about 0.7 meet (Broder 1997; 14 bands of 8 rows, the form that FineWeb took). The best of a
group is chosen by length and id, so the result depends on nothing else, and carries the group's size.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pensar.base.config import Config
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import Judged, list_shards, map_shards, read_shard, read_table, write_table
from pensar.data.hashing import Words64, mix64, text_digest
from pensar.data.words import Words
from pensar.text.document import Document

Signature = npt.NDArray[np.uint32]
CHUNK = 4_096
EXACT, NEAR, UNIQUE = "exact_duplicate", "near_duplicate", ""


class DedupConfig(Config, frozen=True, kw_only=True):
    """How similarity is measured, and for which documents."""

    bands: int = 14
    rows: int = 8
    ngram: int = 5
    near_kinds: tuple[str, ...] = ("text", "code")
    """Task documents are made from templates and look alike on purpose: only equal ones are dropped."""
    min_agreement: float = 0.6
    """Share of equal signature entries that a pair met in a band must have, so that chance meetings join nothing."""
    seed: int = 0

    @property
    def num_hashes(self) -> int:
        return self.bands * self.rows


class Fate(msgspec.Struct, frozen=True):
    """What becomes of one document."""

    cluster: str
    """Id of the document that is kept for its group."""
    size: int
    reason: str


def run(config: DedupConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `documents`; writes them without duplicates, and signatures-*.parquet for later additions."""
    source = inputs["documents"]
    stems = list_shards(source)
    with runtime.progress.track("computing signatures", len(stems), unit="shard") as track:
        for stem in stems:
            path = out / f"signatures-{stem}.parquet"
            if not path.exists():
                write_table(path, signatures_table(read_shard(source, stem), config))
            track.advance()
    table = pa.concat_tables([read_table(out / f"signatures-{stem}.parquet") for stem in stems])
    fates = decide(table, config)

    def judge(documents: list[Document]) -> Judged:
        judged = Judged()
        for document in documents:
            fate = fates[document.id]
            if fate.size > 1:
                document.marks |= {"cluster": fate.cluster, "cluster_size": fate.size}
            if fate.reason:
                judged.drop(document, fate.reason)
            else:
                judged.kept.append(document)
        return judged

    return map_shards(source, out, runtime, "removing duplicates", judge)


def signatures_table(documents: list[Document], config: DedupConfig) -> pa.Table:
    """One row a document: id, text digest, length, and its MinHash signature (empty where none is wanted)."""
    signatures = []
    for document in documents:
        wanted = document.kind in config.near_kinds
        signatures.append(minhash(Words(document.text), config).tobytes() if wanted else b"")
    return pa.table(
        {
            "id": pa.array([document.id for document in documents], pa.string()),
            "digest": pa.array([text_digest(document.text) for document in documents], pa.binary()),
            "length": pa.array([len(document.text) for document in documents], pa.int64()),
            "signature": pa.array(signatures, pa.binary()),
        }
    )


def minhash(words: Words, config: DedupConfig) -> Signature:
    """The least hash of all n-grams under each of the hash functions; empty for a text shorter than one n-gram.

    Function k is the upper half of (a_k x + b_k) modulo 2^64 with a_k odd (Dietzfelbinger's multiply-shift).
    """
    grams = np.unique(words.ngrams(config.ngram))
    if not len(grams):
        return np.empty(0, np.uint32)
    numbers = np.arange(config.num_hashes, dtype=np.uint64)
    a = mix64(numbers, config.seed + 1) | np.uint64(1)
    b = mix64(numbers, config.seed + 2)
    least = np.full(config.num_hashes, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(grams), CHUNK):
        hashed = grams[start : start + CHUNK, None] * a[None, :] + b[None, :]
        np.minimum(least, (hashed >> np.uint64(32)).astype(np.uint32).min(axis=0), out=least)
    return least


def decide(table: pa.Table, config: DedupConfig) -> dict[str, Fate]:
    """The fate of every document from the table of signatures; independent of the order of its rows."""
    table = table.sort_by("id")
    ids: list[str] = table["id"].to_pylist()
    digests: list[bytes] = table["digest"].to_pylist()
    lengths: list[int] = table["length"].to_pylist()
    signatures = [np.frombuffer(row, np.uint32) for row in table["signature"].to_pylist()]
    groups = Groups(len(ids))
    first_of: dict[bytes, int] = {}
    for index, digest in enumerate(digests):
        groups.join(first_of.setdefault(digest, index), index)
    for left, right in candidate_pairs(signatures, config):
        if np.mean(signatures[left] == signatures[right]) >= config.min_agreement:
            groups.join(left, right)
    members: dict[int, list[int]] = {}
    for index in range(len(ids)):
        members.setdefault(groups.root(index), []).append(index)
    fates: dict[str, Fate] = {}
    for group in members.values():
        ranked = sorted(group, key=lambda index: (-lengths[index], ids[index]))
        seen: set[bytes] = set()
        for position, index in enumerate(ranked):
            reason = UNIQUE if position == 0 else (EXACT if digests[index] in seen else NEAR)
            seen.add(digests[index])
            fates[ids[index]] = Fate(ids[ranked[0]], len(group), reason)
    return fates


def candidate_pairs(signatures: list[Signature], config: DedupConfig) -> list[tuple[int, int]]:
    """Pairs of documents that agree in a whole band; a bucket of many gives a chain, which joins it as well."""
    indices = np.array([i for i, row in enumerate(signatures) if len(row)], np.int64)
    if len(indices) < 2:
        return []
    matrix = np.stack([signatures[index] for index in indices]).astype(np.uint64)
    pairs: set[tuple[int, int]] = set()
    for band in range(config.bands):
        keys = _band_keys(matrix[:, band * config.rows : (band + 1) * config.rows])
        order = np.argsort(keys, kind="stable")
        equal = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        left, right = indices[order[equal]].tolist(), indices[order[equal + 1]].tolist()
        pairs.update(zip(left, right, strict=True))
    return sorted(pairs)


class Groups:
    """Disjoint sets of the numbers 0..size-1 (union-find with path halving)."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def root(self, member: int) -> int:
        """The least member of the group."""
        parents = self._parents
        while parents[member] != member:
            parents[member] = parents[parents[member]]
            member = parents[member]
        return member

    def join(self, left: int, right: int) -> None:
        """Makes one group of the two."""
        a, b = sorted((self.root(left), self.root(right)))
        self._parents[b] = a


def _band_keys(band: Words64) -> Words64:
    keys = np.zeros(len(band), np.uint64)
    for column in range(band.shape[1]):
        keys = mix64(keys ^ band[:, column], seed=column)
    return keys
