"""PDF booklets of the demonstration corpus: passages in lines with hyphenation, running headers, page numbers."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

MARGIN = 48.0
LINE_HEIGHT = 14.0
FONT, FONT_SIZE = "Helvetica", 10.5
TITLE_FONT, TITLE_SIZE = "Helvetica-Bold", 13.0
PAGE_WIDTH, PAGE_HEIGHT = 298.0, 420.0
"""A6 in points: even three short passages fill more than one page."""
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


def booklet(code: str, rows: Sequence[dict[str, str]]) -> bytes:
    """A PDF with one passage after another; the same passages give the same bytes."""
    from reportlab.pdfgen.canvas import Canvas

    buffer = io.BytesIO()
    # `invariant` fixes dates and ids.
    canvas = Canvas(buffer, pagesize=(PAGE_WIDTH, PAGE_HEIGHT), invariant=1, pageCompression=1)
    canvas.setTitle(f"Reading passages {code}")
    y = _new_page(canvas, code)
    for row in rows:
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
