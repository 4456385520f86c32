"""Tensor names: patterns that select them, and how two sets of them differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache

from weightops.errors import MismatchError
from weightops.registry import unknown


@lru_cache(maxsize=4096)
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
        return cls(tuple((pattern, float(value)) for pattern, value in patterns.items()))

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
                raise unknown("tensor that matches", pattern, names[:200])


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of ``names`` and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def mismatch(what: str, differences: Mapping[str, list[str]], remedy: str) -> MismatchError:
    """One error for all the ways in which names, shapes and dtypes differ."""
    lines = [f"  {len(items)} {kind}: {some(items)}" for kind, items in differences.items() if items]
    return MismatchError("\n".join([f"{what} don't match", *lines, f"  {remedy}"]))
