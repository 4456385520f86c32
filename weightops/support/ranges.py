"""Ranges of numbers, declared once on the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from weightops.errors import OptionError


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


def check_ranges(instance: Any) -> None:
    """Check that each field of a dataclass that declares a `Range` holds a number in it.

    Raises:
        OptionError: naming the field, its value and its range.
    """
    for name, hint in get_type_hints(type(instance), include_extras=True).items():
        for allowed in get_args(hint)[1:]:
            if isinstance(allowed, Range):
                _check(name, getattr(instance, name), get_args(hint)[0] is int, allowed)


def _check(name: str, value: Any, integer: bool, allowed: Range) -> None:
    is_number = isinstance(value, Integral if integer else Real)
    if not is_number or value not in allowed:
        kind = "an integer" if integer else "a number"
        raise OptionError(f"{name} is {value!r}, and must be {kind} {allowed}")
