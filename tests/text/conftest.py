"""Tokenizers for the tests of this room: one trained here, the official one, and what transformers makes of each."""

import gzip
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pensar.text.tokenizer import Tokenizer, train_tokenizer

CORPUS = [
    "What is 12 + 30? The sum of 12 and 30 is 42. It's what they've said, isn't it?",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "Pensar é pensar duas vezes. Ação, coração, paixão. Naïve café, straße, Ελλάδα, Москва, 東京, 서울, 🙂👩‍👩‍👧.",
    '{"name": "weather", "arguments": {"city": "Lisboa"}}\n\n  user assistant system tool think thinking',
] * 5


@pytest.fixture(scope="session")
def trained() -> Tokenizer:
    return train_tokenizer(CORPUS, 420)


@pytest.fixture(scope="session")
def official_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Unpacks the official tokenizer of the real-data folder once."""
    target = tmp_path_factory.mktemp("official")

    def unpack(data: Path) -> Path:
        source = data / "qwen3-tokenizer"
        if not (target / "tokenizer.json").exists():
            (target / "tokenizer.json").write_bytes(
                gzip.decompress((source / "tokenizer.json.gz").read_bytes())
            )
            shutil.copyfile(source / "tokenizer_config.json", target / "tokenizer_config.json")
        return target

    return unpack


@pytest.fixture(scope="session")
def opened() -> dict[str, Any]:
    return {}


@pytest.fixture
def official(shared_data: Path, official_folder: Callable[[Path], Path], opened: dict[str, Any]) -> Tokenizer:
    if "official" not in opened:
        opened["official"] = Tokenizer.load(official_folder(shared_data))
    return opened["official"]


@pytest.fixture
def official_template(shared_data: Path) -> str:
    config = json.loads((shared_data / "qwen3-tokenizer" / "tokenizer_config.json").read_text())
    return str(config["chat_template"])


@pytest.fixture
def official_peer(
    shared_data: Path,
    official_folder: Callable[[Path], Path],
    opened: dict[str, Any],
    open_with_transformers: Callable[[Path], Any],
) -> Any:
    """The official tokenizer as transformers opens it."""
    if "peer" not in opened:
        opened["peer"] = open_with_transformers(official_folder(shared_data))
    return opened["peer"]


@pytest.fixture(scope="session")
def open_with_transformers() -> Callable[[Path], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations are not ours
        transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained
