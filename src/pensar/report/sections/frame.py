"""What all sections share: their frame, tables, bars, and the word about what is still missing."""

from collections.abc import Sequence

from pensar.report.html import Child, Markup, element

Cell = str | Markup


def section(anchor: str, title: str, *children: Child) -> Markup:
    """A part of the page that can be linked to."""
    return element("section", element("h2", title), *children, id=anchor)


def lead(*sentences: str | None) -> Markup:
    """What to see and how it was measured; sentences about what the run does not have are None."""
    return element("p", " ".join(sentence for sentence in sentences if sentence), class_="lead")


def pending(stage: str, what: str) -> Markup:
    """Says which stage will fill a part of an unfinished run."""
    return element(
        "p", "Not yet: the stage ", element("b", stage), f" will fill in {what}.", class_="pending"
    )


def nothing_yet() -> Markup:
    """Says of a part that needs any stage at all that there is none."""
    return element("p", "Not yet: no stage has finished.", class_="pending")


def figure(*children: Child, class_: str = "") -> Markup:
    """A chart or table with what belongs to it."""
    return element("figure", *children, class_=class_ or None)


def caption(content: str) -> Markup:
    """A line under a figure's title."""
    return element("figcaption", content)


def table(
    header: Sequence[Cell], rows: Sequence[Sequence[Cell]], text_columns: int = 1, class_: str = ""
) -> Markup:
    """A table that scrolls inside its box; the first `text_columns` columns are text, the others numbers."""
    kinds = ["text" if place < text_columns else "number" for place in range(len(header))]
    head = element(
        "tr",
        [element("th", cell, class_=kind, scope="col") for cell, kind in zip(header, kinds, strict=True)],
    )
    body = [
        element("tr", [element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)])
        for row in rows
    ]
    inner = element("table", element("thead", head), element("tbody", body), class_=class_ or None)
    return scrolling(inner)


def scrolling(inner: Markup) -> Markup:
    """A box in which something wide scrolls."""
    return element("div", inner, class_="scroll", tabindex="0")


def bar(share: float, class_: str = "neutral", rest: float = 0.0) -> Markup:
    """A horizontal bar of a share of its box; `rest` adds a pale part behind it."""
    parts = [element("i", class_=class_, style=f"width:{100 * share:.2f}%")]
    if rest > 0:
        parts.append(element("i", class_="rest", style=f"width:{100 * rest:.2f}%"))
    return element("span", parts, class_="bar")


def fold(summary: Child, *children: Child, class_: str = "") -> Markup:
    """A part that opens at a click."""
    return element("details", element("summary", summary), *children, class_=class_ or None)
