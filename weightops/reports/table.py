"""Tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cell(value: object) -> str:
    """A fraction as a percentage with one decimal; anything else as it is."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{100 * value:.1f}"
    return str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns in line: the first to the left, the others to the right."""
    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(line(row, widths) for row in cells)


def line(row: Sequence[str], widths: Sequence[int]) -> str:
    """One row of a table."""
    return "  ".join(
        text.ljust(width) if i == 0 else text.rjust(width)
        for i, (text, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
