"""One registry for everything that can be added to: a table of names, open to other packages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import TypeVar

from weightops.errors import UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Named things of one kind: a built-in table, then the entry points of the group ``weightops.<group>``.

    Args:
        kind: what one entry is called in messages ("task").
        group: the entry-point group, without its prefix ("tasks").
        table: the built-in entries.

    Raises:
        UnknownNameError: from ``registry[name]``, with the nearest names.
    """

    def __init__(self, kind: str, group: str, table: Mapping[str, T]) -> None:
        self.kind = kind
        self._group = f"weightops.{group}"
        self._table = dict(table)
        self._plugins: dict[str, T] | None = None

    def _all(self) -> dict[str, T]:
        if self._plugins is None:
            self._plugins = {point.name: point.load() for point in entry_points(group=self._group)}
        return {**self._plugins, **self._table}

    def __getitem__(self, name: str) -> T:
        if name in self._table:
            return self._table[name]
        try:
            return self._all()[name]
        except KeyError:
            raise unknown(self.kind, name, self._all()) from None

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that isn't known, with the nearest ones that are."""
    known = list(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"known: {', '.join(known[:30])}{', ...' if len(known) > 30 else ''}"
    )
    return UnknownNameError(f"there is no {kind} {name!r}; {hint}")
