"""Tensor names: patterns that select them, and how two sets of them differ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache

from weightops.errors import MismatchError, OptionError
from weightops.registry import unknown


def escape(name: str) -> str:
    """The pattern that matches just this name."""
    return re.sub(r"([*?[])", r"[\1]", name)


def finite(value: float) -> float:
    """A coefficient as a float.

    Raises:
        OptionError: if it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise OptionError(f"a coefficient must be a finite number, not {value}")
    return float(value)


@lru_cache(maxsize=65536)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


@dataclass(frozen=True)
class Rules:
    """A number for each tensor name, by shell patterns: the first that matches counts, 0 where none does.

    >>> rules = Rules.of({"visual.ln_*": 0.5, "visual.*": 1.0})
    >>> rules("visual.ln_pre.weight"), rules("visual.proj"), rules("ln_final.bias")
    (0.5, 1.0, 0.0)
    """

    items: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, patterns: Mapping[str, float]) -> Rules:
        """The rules of a mapping ``{pattern: number}``, in its order."""
        return cls(tuple((pattern, finite(value)) for pattern, value in patterns.items()))

    @classmethod
    def exactly(cls, names: Iterable[str]) -> Rules:
        """1 at the given names, whatever characters they have, and 0 elsewhere."""
        return cls(tuple((escape(name), 1.0) for name in names))

    def __call__(self, name: str) -> float:
        for pattern, value in self.items:
            if pattern == name or _compiled(pattern).match(name):
                return value
        return 0.0

    def check(self, names: Iterable[str]) -> None:
        """Refuse a pattern that matches none of ``names``: it is most likely a slip.

        Raises:
            UnknownNameError: naming the pattern.
        """
        names = list(names)
        for pattern, _ in self.items:
            if pattern not in names and not any(map(_compiled(pattern).match, names)):
                raise unknown("tensor that matches", pattern, names)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of ``names`` and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def mismatch(what: str, differences: Mapping[str, list[str]], remedy: str) -> MismatchError:
    """One error for all the ways in which names, shapes and dtypes differ."""
    lines = [f"  {len(items)} {kind}: {some(items)}" for kind, items in differences.items() if items]
    return MismatchError("\n".join([f"{what} don't match", *lines, f"  {remedy}"]))
