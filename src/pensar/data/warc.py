"""WARC files: pages out of captured responses, and a small deterministic writer for the demonstration corpus."""

import gzip
import hashlib
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIXED_DATE = "2025-01-01T00:00:00Z"
"""Capture date of every record that we write: the same input makes the same bytes."""

PAGE_MIMES = {"text/html", "application/xhtml+xml", "text/plain", "application/pdf", "text/markdown"}
SKIPPED_TYPES = {"warcinfo", "request", "metadata", "revisit", "continuation"}


@dataclass
class Page:
    """One record that may be a document, or the reason why it is none."""

    number: int
    """Of the record in its file, from 1."""
    url: str = ""
    mime: str = ""
    charset: str = ""
    body: bytes = b""
    truncated: bool = False
    problem: str = ""
    """Why it cannot be used; empty when it can."""
    detail: str = ""
    size: int = 0


def read_warc_records(path: Path, max_bytes: int) -> Iterator[Page]:
    """Pages among a file's response, resource and conversion records.

    A record that ends before its declared length is kept as far as it goes (`truncated`); where the file itself
    breaks off or turns into something else, a last page says so with a problem.
    """
    from fastwarc.warc import ArchiveIterator

    number = 0
    with path.open("rb") as stream:
        records = ArchiveIterator(stream, parse_http=True, auto_decode="none")
        while True:
            try:
                record = next(records)
            except StopIteration:
                break
            except OSError as error:
                # Past such a point no record boundary can be trusted.
                yield Page(number + 1, problem="broken_warc", detail=str(error))
                return
            number += 1
            kind = str(record.record_type)
            if kind not in SKIPPED_TYPES:
                yield _page(record, number, kind, max_bytes)
    if not number:
        yield Page(1, problem="broken_warc", detail="no WARC record", size=path.stat().st_size)


def _page(record: Any, number: int, kind: str, max_bytes: int) -> Page:
    page = Page(number, url=record.headers.get("WARC-Target-URI") or "", size=record.content_length)
    headers: dict[str, str] = {}
    page.mime = (record.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    if record.http_headers is not None:
        headers = {str(name).lower(): str(value) for name, value in record.http_headers.items()}
        page.mime = headers.get("content-type", "").partition(";")[0].strip().lower()
        page.charset = record.http_charset or ""
        if record.http_headers.status_code != 200:
            page.problem, page.detail = "http_status", str(record.http_headers.status_code)
            return page
    if kind == "unknown" or (kind == "response" and record.http_headers is None):
        page.problem, page.detail = "no_http_response", kind
        return page
    if page.size > max_bytes:
        page.problem, page.detail = "too_large", f"limit {max_bytes}"
        return page
    return _with_body(page, record, headers, max_bytes)


def _with_body(page: Page, record: Any, headers: dict[str, str], max_bytes: int) -> Page:
    try:
        body = record.reader.read()
    except OSError as error:
        page.problem, page.detail = "broken_record", str(error)
        return page
    page.truncated = len(body) < page.size
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = dechunked(body)
    encoding = headers.get("content-encoding", "").lower()
    if encoding in {"gzip", "x-gzip", "deflate"}:
        body = inflated(body, max_bytes)
    elif encoding not in {"", "identity"}:
        page.problem, page.detail = "content_encoding", encoding
        return page
    page.body = body[:max_bytes]
    page.mime = page.mime if page.mime in PAGE_MIMES else _sniffed(page.mime, body)
    if not body:
        page.problem = "truncated_empty" if page.truncated else "empty"
    elif page.mime not in PAGE_MIMES:
        page.problem, page.detail = "media_type", page.mime
    return page


def _sniffed(mime: str, body: bytes) -> str:
    """The media type of a body whose header is missing or says nothing."""
    if mime not in {"", "application/octet-stream", "unknown/unknown", "text/unknown"}:
        return mime
    head = body[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"%pdf-"):
        return "application/pdf"
    return "text/html" if head.startswith(b"<") else (mime or "unknown")


def dechunked(body: bytes) -> bytes:
    """The content of a chunked HTTP body (RFC 9112, 7.1); a body that is not chunked after all comes back as it is."""
    parts: list[bytes] = []
    position = 0
    while position < len(body):
        end = body.find(b"\r\n", position)
        try:
            size = int(body[position:end].partition(b";")[0], 16)
        except ValueError:
            return b"".join(parts) if parts else body
        if end < 0 or size == 0:
            break
        parts.append(body[end + 2 : end + 2 + size])
        position = end + 2 + size + 2
    return b"".join(parts)


def inflated(body: bytes, max_bytes: int) -> bytes:
    """A gzip or zlib body unpacked up to `max_bytes`, as far as it is whole; the body itself if it is neither."""
    # 47: either header is recognised; -15: servers that send raw deflate.
    for window in (47, -15):
        unpacker = zlib.decompressobj(window)
        try:
            return unpacker.decompress(body, max_bytes)
        except zlib.error:
            continue
    return body


# ---------------------------------------------------------------- writing


def warc_file(pages: list[tuple[str, int, str, bytes]]) -> bytes:
    """A gzip-per-record WARC 1.1 file of pages given as (url, HTTP status, content type, body)."""
    info = b"software: pensar\r\nformat: WARC File Format 1.1\r\n"
    records = [_record("warcinfo", "", "application/warc-fields", info)]
    for url, status, content_type, body in pages:
        phrase = {200: "OK", 404: "Not Found"}.get(status, "Status")
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        records.append(_record("response", url, "application/http; msgtype=response", head.encode() + body))
    return b"".join(gzip.compress(record, compresslevel=6, mtime=0) for record in records)


def _record(kind: str, url: str, content_type: str, block: bytes) -> bytes:
    name = uuid.UUID(bytes=hashlib.sha256(f"{kind} {url}".encode() + block).digest()[:16], version=4)
    lines = ["WARC/1.1", f"WARC-Type: {kind}"]
    if url:
        lines.append(f"WARC-Target-URI: {url}")
    lines += [
        f"WARC-Record-ID: <urn:uuid:{name}>",
        f"WARC-Date: {FIXED_DATE}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(block)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + block + b"\r\n\r\n"
