"""Fixtures of the data room: documents, a runtime, and small corpora on disk."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from pensar.base.stage import Runtime
from pensar.data.documents import Judged, write_judged
from pensar.data.hashing import document_id
from pensar.text.document import Document

MakeDocument = Callable[..., Document]


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(logs=tmp_path / "logs")


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """`store(documents, name)` writes an artifact of one shard for each list of documents."""

    def write(*shards: Iterable[Document], name: str = "documents") -> Path:
        folder = tmp_path / name
        for number, documents in enumerate(shards):
            listed = list(documents)
            write_judged(folder, f"{number:05d}-000", listed, Judged(kept=listed))
        return folder

    return write


@pytest.fixture
def make() -> MakeDocument:
    """`make(text, ...)` is a document whose id follows from its locator."""

    def document(text: str, locator: str = "", source: str = "test", **fields: object) -> Document:
        place = locator or text[:40]
        return Document(id=document_id(source, place), text=text, source=source, locator=place, **fields)

    return document
