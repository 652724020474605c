"""The stage that drops documents which hold evaluation items, and reports what it found.

A document of prose or code is contaminated by any run of 13 words of an item (the length that GPT-3's report used)
or by a whole item that is shorter. Task documents share their templates with evaluation items by design, so there
only a whole item counts, standing as lines of its own. Runs that several items share are template, not content.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pensar.base.config import Config
from pensar.base.errors import ConfigError, DataError
from pensar.base.files import write_atomic
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import Dropped, Judged, map_shards, read_documents, read_dropped
from pensar.data.hashing import Words64, contained, mix64
from pensar.data.words import Positions, Words
from pensar.text.document import Document

REPORT = "contamination.json"
NUM_QUOTED_CHARACTERS = 200
ANCHOR = 6
"""Items are looked up by their first words, then compared whole."""


class DecontaminateConfig(Config, frozen=True, kw_only=True):
    """What counts as overlap."""

    ngram: int = 13
    min_item_words: int = 4
    """A shorter item (`2+2=`) stands everywhere; prose is not checked for it, and the report says how many."""
    max_items_per_ngram: int = 3
    """A run of words in more items than this is template."""
    folders: tuple[str, ...] = ("evaluation", "validation")
    """Folders of the evaluation input whose *.jsonl are protected; its root when none of them exists."""


class Hit(msgspec.Struct, frozen=True):
    """An overlap of a document with an item."""

    item: str
    how: str
    """`ngram` or `whole`."""


class WholeItems:
    """Evaluation items to be found from their first word to their last.

    With `operators`, arithmetic signs are words, so that problems that differ in a sign are different items.
    """

    def __init__(self, items: Sequence[tuple[str, str]], min_words: int, *, operators: bool) -> None:
        self.operators = operators
        self._names: dict[int, str] = {}
        anchors: dict[int, dict[int, set[int]]] = {}
        for name, prompt in items:
            words = Words(prompt, operators=operators)
            if len(words) < min_words:
                continue
            size = min(ANCHOR, len(words))
            key = int(words.ngrams(size)[0])
            anchors.setdefault(size, {}).setdefault(key, set()).add(len(words))
            self._names.setdefault(int(_sized(words, np.array([0]), np.array([len(words)]))[0]), name)
        self._ordered: Words64 = np.array(sorted(self._names), np.uint64)
        # Size of the anchor -> its hashes, and the lengths of the items that begin with each.
        self._anchors = {
            size: (
                np.array(sorted(of), np.uint64),
                {key: np.array(sorted(lengths)) for key, lengths in of.items()},
            )
            for size, of in anchors.items()
        }

    def find(self, text: str, *, own_lines: bool) -> str | None:
        """Name of an item that stands in the text; with `own_lines` only one that ends where a line ends."""
        words = Words(text, operators=self.operators)
        line_ends = words.line_ends()
        for size, (keys, lengths_of) in self._anchors.items():
            grams = words.ngrams(size)
            places = np.flatnonzero(contained(grams, keys))
            for key in sorted(set(grams[places].tolist())):
                starts = places[grams[places] == np.uint64(key)][:, None]
                starts, ends = (
                    grid.ravel() for grid in np.broadcast_arrays(starts, starts + lengths_of[key])
                )
                fits = ends <= len(words)
                fits[fits] = line_ends[ends[fits] - 1] | (not own_lines)
                values = _sized(words, starts[fits], ends[fits])
                found = np.flatnonzero(contained(values, self._ordered))
                if len(found):
                    return self._names[int(values[found[0]])]
        return None


class EvaluationIndex:
    """Evaluation items, ready to be looked for in documents; an item's name is its set and line, `reasoning#12`."""

    def __init__(self, items: Sequence[tuple[str, str]], config: DecontaminateConfig) -> None:
        self.config = config
        self.sets = Counter(_set_of(name) for name, _ in items)
        self._in_tasks = WholeItems(items, config.min_item_words, operators=True)
        self._in_prose = WholeItems(items, config.min_item_words, operators=False)
        self.not_checked: Counter[str] = Counter()
        grams: dict[int, set[str]] = {}
        for name, prompt in items:
            words = Words(prompt)
            if len(words) < config.min_item_words:
                self.not_checked[_set_of(name)] += 1
            for gram in words.ngrams(config.ngram).tolist():
                grams.setdefault(gram, set()).add(name)
        limit = config.max_items_per_ngram
        self._grams = {gram: min(names) for gram, names in grams.items() if len(names) <= limit}
        self._ordered: Words64 = np.array(sorted(self._grams), np.uint64)

    def find(self, document: Document) -> Hit | None:
        """The first overlap that contaminates the document."""
        is_task = document.kind == "task"
        whole = (self._in_tasks if is_task else self._in_prose).find(document.text, own_lines=is_task)
        if whole is not None:
            return Hit(whole, "whole")
        if is_task:
            return None
        grams = Words(document.text).ngrams(self.config.ngram)
        places = np.flatnonzero(contained(grams, self._ordered))
        return Hit(self._grams[int(grams[places[0]])], "ngram") if len(places) else None


def run(config: DecontaminateConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `documents` and `evaluation`; raises DataError if an item should survive in what is kept."""
    index = EvaluationIndex(read_items(inputs["evaluation"], config.folders), config)

    def judge(documents: list[Document]) -> Judged:
        judged = Judged()
        for document in documents:
            hit = index.find(document)
            if hit is None:
                judged.kept.append(document)
                continue
            document.marks |= {"evaluation_item": hit.item, "overlap": hit.how}
            judged.drop(document, "contains_item" if hit.how == "whole" else "contains_item_ngram")
        return judged

    counts = map_shards(inputs["documents"], out, runtime, "looking for evaluation items", judge)
    report = contamination_report(index, read_dropped(out))
    write_atomic(
        out / REPORT, msgspec.json.format(msgspec.json.encode(report, order="deterministic"), indent=2)
    )
    require_clean(read_documents(out), index)
    counts["evaluation_items"] = sum(index.sets.values())
    counts["not_checked"] = sum(index.not_checked.values())
    return counts


def read_items(folder: Path, folders: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(name, prompt) of every item; raises ConfigError without files and DataError for a row without a prompt."""
    roots = [folder / name for name in folders if (folder / name).is_dir()] or [folder]
    paths = [path for root in roots for path in sorted(root.glob("*.jsonl"))]
    if not paths:
        raise ConfigError(f"{folder} holds no *.jsonl of evaluation items; run the stage that writes them")
    items: list[tuple[str, str]] = []
    for path in paths:
        name = f"{path.parent.name}/{path.stem}" if path.parent != folder else path.stem
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                row: Any = msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                raise DataError(f"{path}:{number} is not JSON ({error}); repair the evaluation set") from None
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise DataError(
                    f"{path}:{number} has no text `prompt`; an unprotected item cannot be decontaminated"
                )
            items.append((f"{name}#{number}", row["prompt"]))
    return items


def require_clean(documents: Iterable[Document], index: EvaluationIndex) -> None:
    """Raises DataError when a document that is kept still holds an item."""
    for document in documents:
        hit = index.find(document)
        if hit is not None:
            raise DataError(
                f"document {document.id} ({document.source}, {document.locator}) still holds evaluation item "
                f"{hit.item}; the shards of this stage are older than the evaluation set: remove its folder"
            )


def contamination_report(index: EvaluationIndex, dropped: Iterable[Dropped]) -> dict[str, Any]:
    """Evaluation set -> items, and for each source the documents dropped and one example."""
    sets: dict[str, Any] = {
        name: {"items": num, "not_checked": index.not_checked[name], "sources": {}}
        for name, num in sorted(index.sets.items())
    }
    for document, _ in dropped:
        item = str(document.marks["evaluation_item"])
        sources = sets[_set_of(item)]["sources"]
        example = {"item": item, "document": document.id, "text": document.text[:NUM_QUOTED_CHARACTERS]}
        entry = sources.setdefault(document.source, {"hits": 0, "example": example})
        entry["hits"] += 1
    return {"ngram": index.config.ngram, "sets": sets}


def _set_of(name: str) -> str:
    return name.rpartition("#")[0]


def _sized(words: Words, starts: Positions, ends: Positions) -> Words64:
    """Hashes of runs of words that tell runs of different lengths apart."""
    return mix64(words.windows().at(starts, ends) ^ mix64(ends - starts))
