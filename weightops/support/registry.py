"""One registry for everything that can be added to: names, and the things that they name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from weightops.errors import OptionError, UnknownNameError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

log = logging.getLogger("weightops")

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Named things of one kind: built-in ones, those registered in this session, and plug-ins.

    A plug-in is an entry point of another package in the group ``weightops.<group>``. It is loaded
    when it is first used. One that can't be loaded is a warning that names its package, and its
    name is unavailable. A name is taken once: a plug-in never replaces what was there before it.

    Args:
        kind: what one entry is called in messages, such as "task".
        group: the entry-point group, without its prefix, such as "tasks".
        table: the built-in entries.
        adapt: makes an entry of what an entry point names, given its name and that object;
            by default that object is the entry.

    Raises:
        UnknownNameError: from ``registry[name]``, with the nearest names.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        table: Mapping[str, T],
        *,
        adapt: Callable[[str, Any], T] | None = None,
    ) -> None:
        self.kind, self.group = kind, f"weightops.{group}"
        self._table = dict(table)
        self._adapt = adapt
        self._points: dict[str, EntryPoint] | None = None
        self.unavailable: dict[str, str] = {}
        """Name -> why its plug-in can't be loaded, of those that were tried."""

    def register(self, name: str, thing: T) -> None:
        """Add an entry for this session.

        Raises:
            OptionError: if the name is taken.
        """
        if name in self:
            raise OptionError(
                f"there is a {self.kind} {name!r} already", hint="choose another name"
            )
        self._table[name] = thing

    def _plugins(self) -> dict[str, EntryPoint]:
        """Return the plug-ins that haven't been loaded yet, by name."""
        if self._points is None:
            from importlib.metadata import entry_points  # what asks for no plug-in starts without

            points = {point.name: point for point in entry_points(group=self.group)}
            self._points = {n: point for n, point in points.items() if n not in self._table}
        return self._points

    def _load(self, name: str) -> None:
        """Move a plug-in into the table, or among those that are unavailable."""
        point = self._plugins().pop(name)
        try:
            thing = point.load()
            self._table[name] = self._adapt(name, thing) if self._adapt else thing
        except Exception as error:  # whatever somebody else's code raises
            package = point.dist.name if point.dist else point.value
            self.unavailable[name] = f"{package}: {type(error).__name__}: {error}"
            log.warning(
                "the %s %r can't be loaded from %s", self.kind, name, self.unavailable[name]
            )

    def names(self) -> list[str]:
        """Return all names, without loading any plug-in."""
        return [*self._table, *self._plugins()]

    def __getitem__(self, name: str) -> T:
        if name not in self._table and name in self._plugins():
            self._load(name)
        if name in self.unavailable:
            raise UnknownNameError(
                f"the {self.kind} {name!r} can't be loaded from {self.unavailable[name]}"
            )
        if name not in self._table:
            raise unknown(self.kind, name, self.names())
        return self._table[name]

    def __contains__(self, name: object) -> bool:
        return name in self._table or name in self._plugins()

    def __iter__(self) -> Iterator[str]:
        for name in list(self._plugins()):
            self._load(name)
        return iter(list(self._table))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Registry of {self.group.partition('.')[2]}: {', '.join(self.names())}"


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for a name that isn't known, with the nearest ones that are."""
    known, name = list(known), str(name)[:200]
    longer = [other for other in known if name and other.startswith(name)]
    near = (longer or get_close_matches(name, known, n=3, cutoff=0.5))[:3]
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"known: {', '.join(known[:30])}{', ...' if len(known) > 30 else ''}"
    )
    return UnknownNameError(f"there is no {kind} {name!r}", hint=hint)
