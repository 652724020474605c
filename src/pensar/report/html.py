"""HTML and SVG as functions: text is escaped unless it is markup already."""

import html
from collections.abc import Iterable

VOID = {"meta", "br"}
SHAPES = {"path", "rect", "circle", "line"}
DECIMALS = 2
"""Of coordinates: a hundredth of a pixel."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | Markup | None | Iterable["Child"]
Value = str | float | bool | None


def element(name: str, /, *children: Child, **attributes: Value) -> Markup:
    """`<name attribute="value">children</name>`.

    In names of attributes `_` stands for `-`, and a trailing one is dropped (`class_`); None and False leave the
    attribute out.
    """
    opening = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{opening}>")
    if name in SHAPES and not children:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after another, escaped where they are text."""
    return Markup("".join(_rendered(child) for child in children))


def _rendered(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int):
        return escape(str(child))
    return join(child)


def escape(text: str) -> Markup:
    """Text for any place of a page; characters that no page may hold become a visible sign."""
    visible = "".join(letter if letter >= " " or letter in "\n\t" else "\ufffd" for letter in text)
    return Markup(html.escape(visible.encode("utf-8", "replace").decode("utf-8"), quote=True))


def _attribute(key: str, value: Value) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.{DECIMALS}f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{escape(text)}"'
