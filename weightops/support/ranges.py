"""Ranges of numbers, declared once on parameters and fields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """A range of numbers that annotates a field: ``steps: Annotated[int, Range(min=1)]``.

    Attributes:
        min: the lower bound; None for no lower bound.
        max: the upper bound; None for no upper bound.
        min_open: exclude the lower bound itself.
        max_open: exclude the upper bound itself.

    >>> 1 in Range(0, 1), 1 in Range(0, 1, max_open=True)
    (True, False)
    >>> print(Range(0, 1, max_open=True))
    at least 0 and less than 1
    """

    min: float | None = None
    max: float | None = None
    min_open: bool = False
    max_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.min is None or (value > self.min if self.min_open else value >= self.min)
        below = self.max is None or (value < self.max if self.max_open else value <= self.max)
        return above and below

    def __str__(self) -> str:
        lower = f"{'greater than' if self.min_open else 'at least'} {self.min}"
        upper = f"{'less than' if self.max_open else 'at most'} {self.max}"
        bounds = ((self.min, lower), (self.max, upper))
        return " and ".join(text for bound, text in bounds if bound is not None)
