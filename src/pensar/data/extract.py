"""The stage that turns raw records into documents of plain text."""

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from pensar.base.config import Config
from pensar.base.errors import DataError
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import Judged, add_counts, is_done, list_shards, total_counts, write_judged
from pensar.data.html import page_text
from pensar.data.pdf import pdf_text
from pensar.data.readers import Raw
from pensar.data.sources import raw_records
from pensar.text.document import Document

CONTROLS = {code: None for code in range(32) if chr(code) not in "\t\n"} | {0x7F: None, 0xFEFF: None}
META_CHARSET = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([a-zA-Z0-9_:.-]{2,40})""", re.IGNORECASE
)
SNIFFED_BYTES = 4096
BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class ExtractConfig(Config, frozen=True, kw_only=True):
    """When a page's main part is believed, and how many broken characters a text may have."""

    min_main_share: float = 0.3
    """Below this share of the page's full text, the full text is taken: link lists and indexes lose all else."""
    max_invalid_share: float = 0.02
    """A text with more U+FFFD than this is put aside as `invalid_text`."""


def run(config: ExtractConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads raw-*.parquet of `raw`; writes documents."""
    stems = list_shards(inputs["raw"], "raw")
    with runtime.progress.track("extracting text", len(stems), unit="shard") as track:
        for stem in stems:
            if not is_done(out, stem):
                _extract_shard(config, inputs["raw"], out, stem)
            track.advance()
    counts = total_counts(out)
    if not counts["documents_out"]:
        raise DataError(
            f"no text in any of {counts['documents_in']} records ({counts['dropped']}); "
            "check the sources' formats, and the dropped-*.parquet files of this stage"
        )
    return counts


def extract(raw: Raw, config: ExtractConfig) -> tuple[Document, str]:
    """The document of a record, and the reason why it is none (empty when it is one)."""
    marks = dict(raw.marks)
    document = Document(
        id=raw.id, text="", source=raw.source, locator=raw.locator, kind=raw.kind, marks=marks
    )
    charset = str(marks.pop("charset", ""))
    if raw.mime == "application/pdf":
        text, found, problem = pdf_text(raw.content)
        marks.update(found)
        if problem:
            return document, problem
    else:
        text, invalid = decoded(
            raw.content, charset, is_html=raw.mime in {"text/html", "application/xhtml+xml"}
        )
        invalid += int(marks.get("invalid_characters", 0))
        if invalid:
            marks["invalid_characters"] = invalid
        if invalid > config.max_invalid_share * max(len(text), 1):
            document.text = text[:500]
            return document, "invalid_text"
        if raw.mime in {"text/html", "application/xhtml+xml"}:
            text, found = page_text(text, config.min_main_share)
            marks.update({name: value for name, value in found.items() if name not in marks})
    document.text = tidy(text, keep_indent=raw.kind == "code")
    return document, "" if document.text else "empty"


def decoded(content: bytes, charset: str, *, is_html: bool = False) -> tuple[str, int]:
    """Text of bytes, and how many characters could not be read.

    A byte order mark wins over UTF-8 that is valid, which wins over what the server or the page declares:
    declarations are wrong far more often than bytes are UTF-8 by chance.
    """
    for mark, name in BYTE_ORDER_MARKS:
        if content.startswith(mark):
            text = content.decode(name, "replace")
            return text, text.count("�")
    try:
        return content.decode("utf-8"), 0
    except UnicodeDecodeError:
        pass
    if not charset and is_html and (match := META_CHARSET.search(content[:SNIFFED_BYTES])):
        charset = match[1].decode("ascii")
    if charset.lower() in {"iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii"}:
        charset = "cp1252"  # what browsers do: WHATWG encoding standard, section 4.2
    try:
        text = content.decode(charset or "utf-8", "replace")
    except LookupError:
        text = content.decode("utf-8", "replace")
    return text, text.count("�")


def tidy(text: str, *, keep_indent: bool) -> str:
    """Unix newlines, NFC, no control characters, no trailing blanks, at most one blank line (two in code)."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).translate(CONTROLS)
    text = re.sub(r"[ \t]+\n", "\n", text)
    if keep_indent:
        return text.strip("\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _extract_shard(config: ExtractConfig, source: Path, out: Path, stem: str) -> None:
    judged = Judged()
    documents: list[Document] = []
    formats: dict[str, int] = {}
    pages: dict[str, int] = {}
    raw_bytes = 0
    for raw in raw_records(source, stem):
        document, problem = extract(raw, config)
        documents.append(document)
        raw_bytes += len(raw.content)
        add_counts(formats, {str(raw.marks.get("format", raw.mime)): 1})
        if "pages" in document.marks:
            names = ("pages", "pages_empty", "pages_failed")
            add_counts(pages, {name: document.marks[name] for name in names})
        if problem:
            judged.drop(document, problem)
        else:
            judged.kept.append(document)
    judged.counts = {"bytes_in": raw_bytes, "formats": formats, "pdf": pages}
    write_judged(out, stem, documents, judged)
