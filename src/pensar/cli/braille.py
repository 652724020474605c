"""Curves in a terminal: two columns and four rows of dots to a character."""

from collections.abc import Sequence
from itertools import pairwise

BLANK = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a character's dots, row by row from the top."""
BARS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """`height` lines of `width` characters, the lowest value at the bottom and the highest at the top.

    Neighbours are averaged where there are more values than columns of dots; gaps between dots are filled.
    """
    columns, rows = 2 * width, 4 * height
    points = squeezed(values, columns)
    low, high = min(points, default=0.0), max(points, default=0.0)
    levels = [round((value - low) / (high - low) * (rows - 1)) if high > low else 0 for value in points]
    cells = [[BLANK] * width for _ in range(height)]
    for column, level in enumerate(levels):
        before = levels[column - 1] if column else level
        first, last = sorted((level, before + (level > before) - (level < before)))
        for dot in range(first, last + 1) if column else (level,):
            row = rows - 1 - dot
            cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    return ["".join(map(chr, line)) for line in cells]


def sparkline(values: Sequence[float], width: int) -> str:
    """One line of bars from the lowest to the highest value."""
    points = squeezed(values, width)
    low, high = min(points, default=0.0), max(points, default=0.0)
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((value - low) / span * len(BARS)))] for value in points)


def squeezed(values: Sequence[float], most: int) -> list[float]:
    """At most `most` values: means of equal stretches of neighbours."""
    if len(values) <= most:
        return list(values)
    edges = [round(index * len(values) / most) for index in range(most + 1)]
    return [sum(values[first:last]) / (last - first) for first, last in pairwise(edges)]
