"""Texts of messages."""

from __future__ import annotations

from collections.abc import Iterable


def first_few(names: Iterable[str], most: int = 3) -> str:
    """Return the first few names, and the number of the others.

    >>> first_few(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
