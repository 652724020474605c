"""Reading anyone's files: every format, and every way in which they come broken."""

import gzip
import json
from pathlib import Path

import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warcio.archiveiterator import ArchiveIterator

from pensar.base.errors import ConfigError, DataError
from pensar.base.stage import Counts, Runtime
from pensar.data import sources
from pensar.data.documents import list_shards, read_dropped
from pensar.data.readers import Raw, bounded_lines
from pensar.data.sources import Source, SourcesConfig, raw_records
from pensar.data.warc import dechunked, inflated, read_warc_records, warc_file

PAGE = b"<html><body><p>One page of text.</p></body></html>"
HTML = "text/html; charset=utf-8"


def read(runtime: Runtime, out: Path, *listed: Source, **settings: int) -> tuple[Counts, list[Raw]]:
    counts = sources.run(SourcesConfig(sources=listed, **settings), {}, out, runtime)
    return counts, [raw for stem in list_shards(out, "raw") for raw in raw_records(out, stem)]


def reasons(out: Path) -> list[str]:
    return sorted(dropped.reason for dropped in read_dropped(out))


def test_a_folder_of_mixed_files_is_read_by_suffix(tmp_path: Path, runtime: Runtime) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "deep" / "__pycache__").mkdir(parents=True)
    (corpus / "page.html").write_bytes(PAGE)
    (corpus / "note.txt").write_text("a note")
    (corpus / "deep" / "code.py").write_text("x = 1\n")
    (corpus / "deep" / "__pycache__" / "code.pyc").write_bytes(b"\0")
    (corpus / ".hidden.txt").write_text("hidden")
    (corpus / "rows.jsonl").write_text('{"text": "first", "language": "por_Latn"}\n{"text": "second"}\n')
    (corpus / "photo.raw").write_bytes(b"\1\2\3")
    counts, raws = read(runtime, tmp_path / "out", Source(name="mine", path=str(corpus), license="CC0-1.0"))
    found = {raw.locator: (raw.mime, raw.kind) for raw in raws}
    assert found == {
        "deep/code.py": ("text/x-code", "code"),
        "note.txt": ("text/plain", "text"),
        "page.html": ("text/html", "text"),
        "rows.jsonl#1": ("text/plain", "text"),
        "rows.jsonl#2": ("text/plain", "text"),
    }
    assert reasons(tmp_path / "out") == ["unknown_format"]
    assert (counts["documents_in"], counts["documents_out"]) == (6, 5)
    assert all(raw.marks["license"] == "CC0-1.0" for raw in raws)
    assert next(raw for raw in raws if raw.locator == "rows.jsonl#1").marks["declared_language"] == "por_Latn"


def test_ids_follow_from_source_and_place_only(tmp_path: Path, runtime: Runtime) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b.txt").write_text("text b")
    (tmp_path / "two" / "a.txt").write_text("text a")
    _, first = read(runtime, tmp_path / "out1", Source(name="s", path=str(tmp_path / "one")))
    _, second = read(runtime, tmp_path / "out2", Source(name="s", path=str(tmp_path / "two")))
    assert first[0].id == next(raw.id for raw in second if raw.locator == "b.txt")


def test_rows_come_the_same_from_parquet_and_every_compression(tmp_path: Path, runtime: Runtime) -> None:
    texts = [f"row number {i}, with ünïcode" for i in range(5)]
    lines = "".join(json.dumps({"text": text, "title": "t"}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as sink:
        sink.write(lines)
    pq.write_table(pa.table({"text": texts, "title": ["t"] * 5}), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        _, raws = read(runtime, tmp_path / f"out-{name}", Source(name="s", path=str(tmp_path / name)))
        assert [raw.content.decode() for raw in raws] == texts
        assert raws[0].marks["title"] == "t"


def test_raw_shards_open_in_another_parquet_reader(tmp_path: Path, runtime: Runtime) -> None:
    (tmp_path / "note.txt").write_text("plain")
    read(runtime, tmp_path / "out", Source(name="s", path=str(tmp_path / "note.txt")))
    frame = polars.read_parquet(tmp_path / "out" / "raw-00000-000.parquet")
    assert frame["content"].to_list() == [b"plain"]
    assert frame["locator"].to_list() == ["note.txt"]


def test_a_line_of_50_megabytes_is_put_aside_and_the_rest_is_read(tmp_path: Path, runtime: Runtime) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(50):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n{"text": "after"}\n')
    huge = tmp_path / "huge.txt"
    huge.write_bytes(b"b" * 50_000_000)
    listed = (Source(name="rows", path=str(path)), Source(name="file", path=str(huge)))
    counts, raws = read(runtime, tmp_path / "out", *listed)
    assert [raw.content for raw in raws] == [b"before", b"after"]
    dropped = list(read_dropped(tmp_path / "out"))
    assert [row.reason for row in dropped] == ["too_large", "too_large"]
    assert {row.document.marks["bytes"] for row in dropped} == {50_000_000, 50_000_013}
    assert counts["dropped"] == {"too_large": 2}


def test_bounded_lines_hold_no_more_than_the_limit() -> None:
    import io

    lines = list(bounded_lines(io.BytesIO(b"ab\n" + b"c" * 100 + b"\nde"), 10))
    assert lines == [(1, b"ab\n", 3), (2, b"c" * 11, 101), (3, b"de", 2)]


def test_bad_rows_cost_only_themselves(tmp_path: Path, runtime: Runtime) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": \n\n[1, 2]\n{"other": "x"}\n{"text": 5}\n{"text": "caf\xe9 noir"}\n{"text": ""}\n'
    )
    _, raws = read(runtime, tmp_path / "out", Source(name="rows", path=str(path)))
    assert [raw.content.decode() for raw in raws] == ["good", "caf� noir", ""]
    assert raws[1].marks["invalid_characters"] == 1
    assert reasons(tmp_path / "out") == ["bad_json", "no_text_field", "no_text_field", "no_text_field"]


def test_a_clipped_gzip_keeps_what_can_be_read(tmp_path: Path, runtime: Runtime) -> None:
    rows = b"".join(json.dumps({"text": f"{i} {i * 7919 % 104729}"}).encode() + b"\n" for i in range(5_000))
    whole = gzip.compress(rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    _, raws = read(runtime, tmp_path / "out", Source(name="rows", path=str(tmp_path / "rows.jsonl.gz")))
    assert 1_000 < len(raws) < 5_000
    assert "clipped_file" in reasons(tmp_path / "out")


def test_a_broken_parquet_is_quarantined_and_a_missing_column_is_a_mistake(
    tmp_path: Path, runtime: Runtime
) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is not parquet PAR1")
    (tmp_path / "note.txt").write_text("fine")
    read(runtime, tmp_path / "out", Source(name="s", path=str(tmp_path / "*.*")))
    assert reasons(tmp_path / "out") == ["broken_parquet"]
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match="no column 'text' but body; set text_field"):
        read(runtime, tmp_path / "out2", Source(name="s", path=str(tmp_path / "other.parquet")))


def test_a_path_that_is_not_there_is_a_mistake(tmp_path: Path, runtime: Runtime) -> None:
    for path in ("absent", "absent/*.txt", "*.nothing"):
        with pytest.raises(ConfigError, match="correct its path"):
            read(runtime, tmp_path / "out", Source(name="mine", path=str(tmp_path / path)))


def test_an_empty_corpus_says_what_to_do(tmp_path: Path, runtime: Runtime) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file was found.*point data.sources"):
        read(runtime, tmp_path / "out", Source(name="mine", path=str(tmp_path / "empty")))
    (tmp_path / "empty" / "image.raw").write_bytes(b"\0")
    with pytest.raises(DataError, match="unknown_format 1"):
        read(runtime, tmp_path / "out2", Source(name="mine", path=str(tmp_path / "empty")))


def test_no_source_and_two_sources_of_one_name_are_mistakes(tmp_path: Path, runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match="names no source"):
        read(runtime, tmp_path / "out")
    twice = Source(name="mine", path=str(tmp_path))
    with pytest.raises(ConfigError, match="two sources are named 'mine'"):
        read(runtime, tmp_path / "out", twice, twice)


def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, runtime: Runtime) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(6):
        (corpus / f"{number}.txt").write_text(f"text {number} " * 20)
    source = Source(name="mine", path=str(corpus))
    read(runtime, tmp_path / "whole", source, shard_bytes=300)
    read(runtime, tmp_path / "killed", source, shard_bytes=300)
    (tmp_path / "killed" / "counts-00002.json").unlink()
    (tmp_path / "killed" / "raw-00002-000.parquet").write_bytes(b"half")
    read(runtime, tmp_path / "killed", source, shard_bytes=300)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) > 6
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}


# ---------------------------------------------------------------- WARC


def test_our_warc_is_read_by_another_reader_and_by_ourselves(tmp_path: Path) -> None:
    pages = [("https://a.example/1", 200, HTML, PAGE), ("https://a.example/2", 404, HTML, b"gone")]
    path = tmp_path / "pages.warc.gz"
    path.write_bytes(warc_file(pages))
    assert warc_file(pages) == path.read_bytes()
    with path.open("rb") as stream:
        records = [
            (
                record.rec_type,
                record.rec_headers.get_header("WARC-Target-URI"),
                record.content_stream().read(),
            )
            for record in ArchiveIterator(stream, check_digests=True)
        ]
    assert [record[0] for record in records] == ["warcinfo", "response", "response"]
    assert records[1][1:] == ("https://a.example/1", PAGE)
    ours = list(read_warc_records(path, 1 << 20))
    assert [(page.url, page.problem, page.charset) for page in ours] == [
        ("https://a.example/1", "", "utf-8"),
        ("https://a.example/2", "http_status", "utf-8"),
    ]
    assert ours[0].body == PAGE


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_truncated_warc_keeps_the_records_before_the_cut(tmp_path: Path, cut: int) -> None:
    body = (
        b"<html><body>" + b"".join(b"<p>paragraph %d of it</p>" % (i * 7919) for i in range(300)) + b"</body>"
    )
    whole = warc_file([("https://a.example/1", 200, HTML, PAGE), ("https://a.example/2", 200, HTML, body)])
    path = tmp_path / "cut.warc.gz"
    path.write_bytes(whole[: len(whole) - cut])
    pages = list(read_warc_records(path, 1 << 20))
    assert pages[0].body == PAGE
    assert not pages[0].truncated
    last = pages[-1]
    assert last.truncated or last.problem or last.body == body


def test_an_uncompressed_warc_that_ends_in_a_record_is_marked_truncated(tmp_path: Path) -> None:
    whole = gzip.decompress(warc_file([("https://a.example/1", 200, HTML, PAGE * 100)]))
    path = tmp_path / "cut.warc"
    path.write_bytes(whole[:-2_000])
    (page,) = read_warc_records(path, 1 << 20)
    assert page.truncated
    assert page.body == (PAGE * 100)[: len(PAGE * 100) - 2_000 + 4]


def test_garbage_that_calls_itself_warc_is_one_quarantined_row(tmp_path: Path, runtime: Runtime) -> None:
    (tmp_path / "a.warc").write_bytes(b"hello world\n" * 100)
    (tmp_path / "b.warc.gz").write_bytes(b"")
    (tmp_path / "note.txt").write_text("fine")
    read(runtime, tmp_path / "out", Source(name="s", path=str(tmp_path / "*.*")))
    assert reasons(tmp_path / "out") == ["broken_warc", "broken_warc"]


def test_pages_that_are_no_documents_are_named(tmp_path: Path, runtime: Runtime) -> None:
    pages = [
        ("https://a.example/ok", 200, HTML, PAGE),
        ("https://a.example/image", 200, "image/png", b"\x89PNG"),
        ("https://a.example/empty", 200, HTML, b""),
        ("https://a.example/big", 200, HTML, b"x" * 5_000),
        ("https://a.example/unknown", 200, "", PAGE),
    ]
    (tmp_path / "p.warc.gz").write_bytes(warc_file(pages))
    source = Source(name="s", path=str(tmp_path / "p.warc.gz"))
    _, raws = read(runtime, tmp_path / "out", source, max_document_bytes=4_000)
    assert [raw.marks["url"] for raw in raws] == ["https://a.example/ok", "https://a.example/unknown"]
    assert reasons(tmp_path / "out") == ["empty", "media_type", "too_large"]


def test_transfer_and_content_encodings_are_undone() -> None:
    assert dechunked(b"4\r\nWiki\r\n6;x=y\r\npedia \r\n0\r\n\r\n") == b"Wikipedia "
    assert dechunked(b"<html>not chunked") == b"<html>not chunked"
    assert dechunked(b"ff\r\nclipped") == b"clipped"
    assert inflated(gzip.compress(PAGE), 1_000) == PAGE
    assert inflated(gzip.compress(PAGE)[:-12], 1_000) in PAGE
    assert inflated(b"plain after all", 1_000) == b"plain after all"


@pytest.mark.parametrize(
    ("name", "documents", "truncated"),
    [
        ("clipped.warc.gz", 1, 1),
        ("example-iana.org-chunked.warc", 1, 0),
        ("example.warc.gz", 1, 0),
        ("warcfile.warc.gz", 15, 0),
        ("clueweb-quirk.warc.gz", 25, 0),
    ],
)
def test_real_warc_files_are_read(
    shared_data: Path, tmp_path: Path, runtime: Runtime, name: str, documents: int, truncated: int
) -> None:
    _, raws = read(runtime, tmp_path / "out", Source(name="real", path=str(shared_data / "warc" / name)))
    assert len(raws) >= documents
    assert sum(bool(raw.marks.get("truncated")) for raw in raws) == truncated
    assert all(b"<" in raw.content[:2_000] for raw in raws)
