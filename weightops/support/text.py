"""TODO."""

from __future__ import annotations

from collections.abc import Iterable


def first_few(names: Iterable[str], most: int = 3) -> str:
    """The first few of ``names`` and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
