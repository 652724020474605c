"""Document: one text with its origin and what has been found out about it."""

from typing import Any

import msgspec


class Document(msgspec.Struct, kw_only=True):
    """The unit of every data stage; a row of Parquet between stages."""

    id: str
    """Stable over re-runs: a hash of source and locator, never of the position in a batch."""
    text: str
    source: str
    """Name of the source in the recipe."""
    locator: str = ""
    """Where inside the source: a path, a URL, a record number."""
    kind: str = "text"
    """How it should be read: text, code or task."""
    language: str = "und"
    """ISO 639-3 code and script, such as `por_Latn`; `und` when unknown."""
    marks: dict[str, Any] = msgspec.field(default_factory=dict)
    """Annotations by name: numbers and short strings."""
