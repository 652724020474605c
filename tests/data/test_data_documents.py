"""Documents on disk: nothing changes on the way, other readers open it, and a killed stage goes on."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import polars
import pytest

from pensar.base.errors import DataError
from pensar.base.stage import Runtime
from pensar.data.documents import (
    Judged,
    add_counts,
    list_shards,
    map_shards,
    read_documents,
    read_dropped,
)
from pensar.text.document import Document

Make = Callable[..., Document]


def halve(documents: list[Document]) -> Judged:
    """Keeps documents of even length, counts the letter e."""
    judged = Judged()
    for document in documents:
        if len(document.text) % 2:
            judged.drop(document, "odd")
        else:
            judged.kept.append(document)
        add_counts(judged.counts, {"letters": {"e": document.text.count("e")}})
    return judged


def test_a_document_comes_back_as_it_was_and_other_readers_see_it(
    store: Callable[..., Path], make: Make
) -> None:
    marks = {"title": "Ünï", "score": 0.5, "pages": 3, "seen": True}
    documents = [make("text\nwith lines 語", kind="code", language="por_Latn", marks=marks), make("")]
    folder = store(documents)
    assert list(read_documents(folder)) == documents
    frame = polars.read_parquet(folder / "documents-00000-000.parquet")
    assert frame["text"].to_list() == [document.text for document in documents]
    assert msgspec.json.decode(frame["marks"][0]) == marks


def test_a_stage_that_is_killed_goes_on_with_the_shards_it_lacks(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Make
) -> None:
    shards = [[make("e" * size, f"{number}-{size}") for size in range(1, 20)] for number in range(4)]
    source = store(*shards)
    whole = map_shards(source, tmp_path / "whole", runtime, "halving", halve)
    seen: list[int] = []

    def die_at_third(documents: list[Document]) -> Judged:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(documents))
        return halve(documents)

    with pytest.raises(KeyboardInterrupt):
        map_shards(source, tmp_path / "killed", runtime, "halving", die_at_third)
    (tmp_path / "killed" / "documents-00002-000.parquet").write_bytes(b"half a file")
    again = map_shards(source, tmp_path / "killed", runtime, "halving", halve)
    assert again == whole
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    assert whole["letters"] == {"e": 4 * sum(range(1, 20))}
    assert whole["dropped"] == {"odd": 40}
    assert (whole["documents_in"], whole["documents_out"]) == (76, 36)
    assert {row.reason for row in read_dropped(tmp_path / "whole")} == {"odd"}


def test_missing_and_broken_shards_are_told(tmp_path: Path, store: Callable[..., Path], make: Make) -> None:
    with pytest.raises(DataError, match=r"has no documents-.*parquet; run the stage that writes them"):
        list_shards(tmp_path)
    folder = store([make("fine")])
    (folder / "documents-00000-000.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(read_documents(folder))


def test_counts_of_shards_add_up_at_every_depth() -> None:
    total: dict[str, object] = {}
    add_counts(total, {"a": 1, "b": {"x": 1, "y": {"z": 2}}})
    add_counts(total, {"a": 2, "b": {"w": 5, "y": {"z": 3}}, "name": "kept"})
    assert total == {"a": 3, "b": {"w": 5, "x": 1, "y": {"z": 5}}, "name": "kept"}
