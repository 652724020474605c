"""PDF leaflets of the demonstration corpus: a passage in lines with hyphenation, running headers, page numbers."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

MARGIN = 48.0
LINE_HEIGHT = 14.0
FONT, FONT_SIZE = "Helvetica", 10.5
TITLE_FONT, TITLE_SIZE = "Helvetica-Bold", 13.0
PAGE_WIDTH, PAGE_HEIGHT = 298.0, 210.0
"""A7 across, in points: even a short passage fills more than one page, so that running headers can be told."""
MIN_HYPHENATED = 11
"""Shorter words are not broken at a line's end."""


def fits_pdf(rows: Sequence[dict[str, str]]) -> bool:
    """Whether the fonts that every PDF reader brings can write these passages (Windows code page 1252)."""
    try:
        for row in rows:
            (row["title"] + row["text"]).encode("cp1252")
    except UnicodeEncodeError:
        return False
    return True


def leaflet(code: str, row: dict[str, str]) -> bytes:
    """A PDF with one passage, which declares its language; the same passage gives the same bytes."""
    from reportlab.pdfgen.canvas import Canvas

    buffer = io.BytesIO()
    # `invariant` fixes dates and ids.
    language = code.partition("_")[0]
    canvas = Canvas(buffer, pagesize=(PAGE_WIDTH, PAGE_HEIGHT), invariant=1, pageCompression=1, lang=language)
    canvas.setTitle(row["title"])
    y = _new_page(canvas, code)
    lines = [(TITLE_FONT, TITLE_SIZE, row["title"])]
    for paragraph in row["text"].split("\n"):
        lines += [(FONT, FONT_SIZE, line) for line in wrapped(paragraph.split())]
    for font, size, line in lines:
        if y < MARGIN:
            canvas.showPage()
            y = _new_page(canvas, code)
        canvas.setFont(font, size)
        canvas.drawString(MARGIN, y, line)
        y -= LINE_HEIGHT
    canvas.showPage()
    canvas.save()
    return buffer.getvalue()


def wrapped(words: Sequence[str]) -> Iterator[str]:
    """Lines as wide as the page; a long word is broken in its middle with a hyphen when it fits no more."""
    from reportlab.pdfbase.pdfmetrics import stringWidth

    width = PAGE_WIDTH - 2 * MARGIN

    def fits(line: str) -> bool:
        return bool(stringWidth(line, FONT, FONT_SIZE) <= width)

    line = ""
    for word in words:
        longer = f"{line} {word}".strip()
        if fits(longer):
            line = longer
            continue
        middle = len(word) // 2
        head = f"{line} {word[:middle]}-"
        if len(word) >= MIN_HYPHENATED and word.isalpha() and fits(head):
            yield head
            line = word[middle:]
        else:
            yield line
            line = word
    if line:
        yield line


def _new_page(canvas: Any, code: str) -> float:
    """Header and footer of a page; returns the height of its first line."""
    canvas.setFont(FONT, 8)
    canvas.drawString(MARGIN, PAGE_HEIGHT - 30, f"Pensar reading passages, {code}")
    canvas.drawString(PAGE_WIDTH / 2, 24, str(canvas.getPageNumber()))
    return PAGE_HEIGHT - MARGIN
