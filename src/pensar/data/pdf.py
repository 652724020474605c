"""PDF files to plain text by PDFium: page by page, without running headers, with lines joined to paragraphs."""

import re
from collections import Counter
from statistics import median
from typing import Any

MARGIN_LINES = 2
"""How many lines at the top and the bottom of a page may be a running header or footer."""
MIN_REPEATED_PAGES = 2
MIN_REPEATED_SHARE = 0.5
SHORT_LINE = 0.75
"""A line shorter than this share of the usual length ends a paragraph."""
# PDFium marks a hyphen at a line's end with U+0002 or U+FFFE.
HYPHENATION = re.compile(r"(\w)(?:[\u0002\ufffe\u00ad]|-(?=\n[^\W\d_]))\n?(?=[^\W\d_])")
SENTENCE_END = (".", "!", "?", ":", "…", "。", "»", "”", '"')


def pdf_text(content: bytes) -> tuple[str, dict[str, Any], str]:
    """Text, marks with the status of the pages, and the reason when there is no text (else empty).

    A page whose text cannot be read is counted and listed, never skipped in silence.
    """
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        return "", {"error": str(error), "bytes": len(content)}, "broken_pdf"
    language = declared_language(document)
    pages: list[list[str]] = []
    failed: list[int] = []
    empty: list[int] = []
    try:
        for number in range(len(document)):
            try:
                lines = page_lines(document[number].get_textpage().get_text_range())
            except pypdfium2.PdfiumError:
                failed.append(number + 1)
                continue
            if not lines:
                empty.append(number + 1)
            pages.append(lines)
    finally:
        num_pages = len(document)
        document.close()
    marks: dict[str, Any] = {"pages": num_pages, "pages_empty": len(empty), "pages_failed": len(failed)}
    if language:
        marks["declared_language"] = language
    if failed:
        marks["failed_pages"] = ",".join(map(str, failed[:20]))
    if empty:
        marks["empty_pages"] = ",".join(map(str, empty[:20]))
    body = without_running_lines(pages)
    text = paragraphs([line for page in body for line in page])
    return text, marks, "" if text.strip() else "pdf_without_text"


def declared_language(document: Any) -> str:
    """The language that the catalogue declares (`/Lang`, ISO 32000-1, 14.9.2), empty where it says nothing."""
    from pypdfium2 import raw

    if not hasattr(raw, "FPDFCatalog_GetLanguage"):  # PDFium before 2025
        return ""
    size = raw.FPDFCatalog_GetLanguage(document.raw, None, 0)
    buffer = (raw.FPDF_WCHAR * ((size + 1) // 2))()
    raw.FPDFCatalog_GetLanguage(document.raw, buffer, size)
    return bytes(buffer).decode("utf-16-le", "replace").rstrip("\0").strip()


def page_lines(text: str) -> list[str]:
    """A page's lines without those that are blank."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def without_running_lines(pages: list[list[str]]) -> list[list[str]]:
    """Pages without lines that stand at the edge of most of them, whatever numbers they carry."""
    edges = [{_numberless(line) for line in _edge(page)} for page in pages]
    seen = Counter(line for edge in edges for line in edge)
    least = max(MIN_REPEATED_PAGES, MIN_REPEATED_SHARE * len(pages))
    running = {line for line, times in seen.items() if times >= least}
    return [_strip_edges(page, running) for page in pages]


def paragraphs(lines: list[str]) -> str:
    """Lines joined: a hyphen at a line's end goes, a full line goes on in the next, a short one ends a paragraph."""
    if not lines:
        return ""
    usual = median(sorted(len(line) for line in lines)[len(lines) // 2 :])
    parts: list[str] = []
    for line in lines:
        parts.append(line)
        hyphenated = line.endswith(("-", "\u0002", "\ufffe", "\u00ad"))
        ends = len(line) < SHORT_LINE * usual or (len(line) < 0.9 * usual and line.endswith(SENTENCE_END))
        parts.append("\n" if hyphenated else ("\n\n" if ends else " "))
    text = HYPHENATION.sub(r"\1", "".join(parts))
    return text.strip()


def _edge(page: list[str]) -> list[str]:
    return page[:MARGIN_LINES] + page[-MARGIN_LINES:]


def _numberless(line: str) -> str:
    return re.sub(r"\d+", "#", line)


def _strip_edges(page: list[str], running: set[str]) -> list[str]:
    first, last = 0, len(page)
    while first < min(MARGIN_LINES, last) and _numberless(page[first]) in running:
        first += 1
    while last > max(first, len(page) - MARGIN_LINES) and _numberless(page[last - 1]) in running:
        last -= 1
    return page[first:last]
