"""Tables of results as text, and the parts of a summary that tables and pictures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightops.errors import printable
from weightops.support.text import decimal


def cell(value: object) -> str:
    """Return a fraction as a percentage with one decimal, and other values as they are.

    >>> cell(0.5), cell(float("nan")), cell(3), cell(-1e-9)
    ('50.0', '-', '3', '0.0')
    """
    if isinstance(value, float):
        return decimal(100 * value, 1)
    return printable(str(value))


def change(value: float) -> str:
    """Return the difference of two fractions in points, with its sign.

    >>> change(0.0213), change(-0.5), change(-1e-9)
    ('+2.1', '-50.0', '0.0')
    """
    points = round(100 * value, 1)
    return f"{points:+.1f}" if points else "0.0"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return aligned columns, the first to the left, the others to the right."""
    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(line(row, widths) for row in cells)


def line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return one row of a table."""
    first, *others = (
        text.rjust(width) if i else text.ljust(width)
        for i, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def models_of(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of all models that a summary has scores of, in order."""
    scored = (
        model for task in tasks.values() for model in task if isinstance(task[model], Mapping)
    )
    return list(dict.fromkeys(scored))


def alpha_text(alpha: float | Mapping[str, float]) -> str:
    """Return the coefficient of a summary, or its coefficients with their names.

    >>> alpha_text(0.5), alpha_text({"mnist": 0.5, "digits": 1.0})
    ('0.5', '0.5 (mnist), 1 (digits)')
    """
    if isinstance(alpha, Mapping):
        return ", ".join(f"{value:g} ({name})" for name, value in alpha.items())
    return f"{alpha:g}"
