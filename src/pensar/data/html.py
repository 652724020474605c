"""HTML pages to plain text by resiliparse: the main part, or all of it where the main part is hardly there."""

import re
from typing import Any

TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
LANG = re.compile(r"""<html[^>]{0,300}?\slang\s*=\s*["']?([a-zA-Z-]{2,12})""", re.IGNORECASE)
HEAD_CHARACTERS = 8192
MIN_FULL_CHARACTERS = 200
BOILERPLATE = ["nav", "header", "footer", "aside", "form", "button", "[role=navigation]", "[role=banner]"]
"""Elements that are never the text of a page, left out of the full text too."""


def page_text(html: str, min_main_share: float) -> tuple[str, dict[str, Any]]:
    """Text of a page and marks: which part was taken, the title, the declared language."""
    from resiliparse.extract.html2text import extract_plain_text

    main = extract_plain_text(html, main_content=True, preserve_formatting=True).strip()
    full = extract_plain_text(html, preserve_formatting=True, skip_elements=BOILERPLATE).strip()
    marks: dict[str, Any] = {"extraction": "main"}
    share = len(main) / max(len(full), 1)
    text = main
    if share < min_main_share and len(full) >= MIN_FULL_CHARACTERS:
        text, marks["extraction"] = full, "full"
    head = html[:HEAD_CHARACTERS]
    if match := TITLE.search(head):
        marks["title"] = extract_plain_text(match[1]).strip()[:200]
    if match := LANG.search(head):
        marks["declared_language"] = match[1]
    return text, marks
