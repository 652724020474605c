"""The demonstration corpus, and all ten stages after one another on a small one of it."""

import json
import platform
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.stage import Counts, Runtime
from pensar.data import (
    annotate,
    decontaminate,
    dedup,
    demo,
    extract,
    filters,
    language,
    mixture,
    shards,
    sources,
)
from pensar.data.demo import SOURCES, DemoConfig
from pensar.data.demo_pages import edited, topic_html
from pensar.data.documents import read_documents, read_dropped
from pensar.data.order import PretrainData
from pensar.text.tokenizer import train_tokenizer

SMALL = DemoConfig(python=platform.python_version(), max_code_files=20, max_code_bytes=200_000, problems=30)
KEYS = {"documents_in", "documents_out", "bytes_in", "bytes_out", "dropped"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def chain(root: Path, runtime: Runtime) -> dict[str, Counts]:
    """Every stage of the room on the small demonstration corpus."""
    counts: dict[str, Counts] = {}

    def stage(name: str, module: ModuleType, config: Config, **inputs: str) -> None:
        folders = {role: root / folder for role, folder in inputs.items()}
        (root / name).mkdir(parents=True)
        counts[name] = module.run(config, folders, root / name, runtime)

    stage("demo", demo, SMALL)
    stage("raw", sources, sources.SourcesConfig(sources=SOURCES), demo="demo")
    stage("text", extract, extract.ExtractConfig(), raw="raw")
    stage("language", language, language.LanguageConfig(), documents="text")
    stage("filtered", filters, filters.FiltersConfig(), documents="language")
    stage("dedup", dedup, dedup.DedupConfig(), documents="filtered")
    (root / "evaluation").mkdir()
    quoted = "Assert statements are a convenient way to insert debugging assertions into a program"
    (root / "evaluation" / "quiz.jsonl").write_text(json.dumps({"prompt": quoted, "answer": ""}) + "\n")
    stage(
        "clean",
        decontaminate,
        decontaminate.DecontaminateConfig(),
        documents="dedup",
        evaluation="evaluation",
    )
    stage("labels", annotate, annotate.AnnotateConfig(), documents="clean")
    stage("mix", mixture, mixture.MixtureConfig(), documents="labels")
    train_tokenizer((d.text for d in read_documents(root / "labels")), 600).save(root / "tokenizer")
    stage("shards", shards, shards.ShardsConfig(), documents="labels", mixture="mix", tokenizer="tokenizer")
    return counts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Counts]]:
    root = tmp_path_factory.mktemp("chain")
    return root, chain(root / "run", Runtime(logs=root / "logs"))


def test_another_python_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"demo.python is '2.7', but this is Python"):
        demo.require_python("2.7")


def test_all_stages_run_on_the_demonstration_corpus(run: tuple[Path, dict[str, Counts]]) -> None:
    root, counts = run
    for name, found in counts.items():
        if name != "mix":
            assert found.keys() >= KEYS, name
    names = ["raw", "text", "language", "filtered", "dedup", "clean", "labels", "shards"]
    for before, after in pairwise(names):
        assert counts[before]["documents_out"] == counts[after]["documents_in"]
    for name in names[:-1]:
        found = counts[name]
        assert found["documents_in"] == found["documents_out"] + sum(found["dropped"].values()), name
    data = PretrainData(root / "run" / "shards", "long", 256, 1)
    assert data.num_tokens > 50_000
    assert data.long_share > 0.6


def test_the_junk_is_caught_and_the_near_duplicates_are_found(run: tuple[Path, dict[str, Counts]]) -> None:
    root = run[0] / "run"
    dropped = {}
    for name in ("raw", "text", "filtered", "dedup", "clean"):
        for row in read_dropped(root / name):
            dropped[row.document.locator.rpartition(" ")[2]] = (name, row.reason)
    junk = {url.rpartition("/")[2]: where for url, where in dropped.items() if "/junk/" in url}
    assert junk["pixel.gif"] == ("raw", "media_type")
    assert junk["not-found.html"] == ("raw", "http_status")
    assert junk["empty.html"] == ("text", "empty")
    assert junk["broken-utf8.html"] == ("text", "invalid_text")
    assert {
        junk[f"{name}.html"][0] for name in ("link-farm", "repeated", "lorem-ipsum", "cookie-banner")
    } == {"filtered"}
    kept = {document.locator.rpartition(" ")[2] for document in read_documents(root / "labels")}
    assert not [url for url in kept if "/junk/" in url]
    copies = [url for url in dropped if "reference.example.org" in url and dropped[url][0] == "dedup"]
    assert len(copies) >= 8
    assert [reason for name, reason in dropped.values() if name == "clean"] == ["contains_item"]


def test_private_addresses_are_masked_on_the_contact_page(run: tuple[Path, dict[str, Counts]]) -> None:
    (page,) = [d for d in read_documents(run[0] / "run" / "labels") if "contact.html" in d.locator]
    assert "python-reference.dev" not in page.text
    assert "193.136.2.17" not in page.text
    assert (page.marks["emails_masked"], page.marks["ips_masked"]) == (2, 1)


def test_passages_come_through_every_container_in_their_language(run: tuple[Path, dict[str, Counts]]) -> None:
    documents = list(read_documents(run[0] / "run" / "labels"))
    by_source: dict[str, set[str]] = {}
    for document in documents:
        by_source.setdefault(document.source, set()).add(document.language)
    for name in ("passages-pdf", "passages-parquet", "passages-jsonl"):
        assert len(by_source[name]) >= 5, name
    written = demo.read_passages(Path(demo.__file__).with_name(demo.PASSAGES))
    found = Counter(d.language for d in documents if d.source.startswith("passages-"))
    assert found == {code: len(rows) for code, rows in written.items()}
    assert {d.language for d in documents if d.kind == "code"} == {"zxx"}


def test_the_same_configuration_gives_the_same_bytes(
    run: tuple[Path, dict[str, Counts]], tmp_path: Path
) -> None:
    start = time.process_time()
    chain(tmp_path / "run", Runtime(logs=tmp_path / "logs"))
    seconds = time.process_time() - start
    assert contents(run[0] / "run") == contents(tmp_path / "run")
    assert seconds < 30


def test_topics_become_readable_pages() -> None:
    page = topic_html(
        "The title\n*********\n\nA paragraph\nof <text>.\n\n   x = 1\n   y = 2\n\n* one\n  more\n\n* two"
    )
    assert page.split("\n") == [
        "<h1>The title</h1>",
        "<p>A paragraph of &lt;text&gt;.</p>",
        "<pre>x = 1",
        "y = 2</pre>",
        "<ul><li>one more</li></ul>",
        "<ul><li>two</li></ul>",
    ]
    assert edited("must may must may must") == "must may has to may must"
