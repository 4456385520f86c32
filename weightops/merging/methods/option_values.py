"""Checks of the values that options of merge methods have at one tensor."""

from __future__ import annotations

from weightops.algebra.names import Each
from weightops.errors import OptionError


def per_input(value: float | Each, k: int) -> list[float]:
    """Return an option's value for each of ``k`` inputs.

    Raises:
        OptionError: if the option has values for another number of inputs.
    """
    if not isinstance(value, Each):
        return [value] * k
    if len(value) != k:
        raise OptionError(f"there are {k} inputs, and values for {len(value)}: {list(value)}")
    return list(value)


def fraction(value: float, name: str = "density") -> float:
    """Return a fraction.

    Raises:
        OptionError: if it is outside of [0, 1].
    """
    if not 0 <= value <= 1:
        raise OptionError(f"{name} is a fraction, from 0 to 1, not {value}")
    return value


def kept_count(density: float, numel: int) -> int:
    """Return how many elements a density keeps: rounded down, but one at least unless it is 0."""
    return max(int(fraction(density) * numel), 1) if density > 0 else 0
