"""Read YAML whose mappings and lists know the line of each entry, so that messages can name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import yaml

from weightops.errors import WeightopsError
from weightops.support.yaml_files import read_documents


class LinedDict(dict[Any, Any]):
    """A mapping that knows the line of each key, counted from 1."""

    def __init__(self, content: Any = (), lines: Mapping[Any, int] | None = None) -> None:
        super().__init__(content)
        self.lines = dict(lines or {})


class LinedList(list[Any]):
    """A list that knows the line of each item, counted from 1."""

    def __init__(self, content: Any = (), lines: Mapping[Any, int] | None = None) -> None:
        super().__init__(content)
        self.lines = dict(lines or {})


def lines_of(container: Any) -> Mapping[Any, int]:
    """Return the line of each entry of a mapping or list, as far as they are known."""
    lines: Mapping[Any, int] = getattr(container, "lines", {})
    return lines


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """The safe loader, whose mappings and lists know their lines."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[LinedDict]:
    lined = LinedDict()
    yield lined
    loader.flatten_mapping(node)
    lined.update(loader.construct_mapping(node))
    for key, _ in node.value:
        lined.lines[loader.construct_object(key)] = key.start_mark.line + 1


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> Iterator[LinedList]:
    lined = LinedList((), {i: item.start_mark.line + 1 for i, item in enumerate(node.value)})
    yield lined
    lined.extend(loader.construct_sequence(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)


def read_lined(path: Path) -> list[Any]:
    """Read all documents of a YAML file; their mappings and lists know their lines.

    Raises:
        RecipeError: as `read_documents`.
    """
    return read_documents(path, _Loader)


def line_of(container: Any, key: Any) -> str:
    """Return "line 7" for an entry whose line is known, or an empty text."""
    line = lines_of(container).get(key)
    return f"line {line}" if line else ""


def at(container: Any, key: Any) -> AbstractContextManager[None]:
    """Put the line of an entry before the errors that are raised within, as `located` does."""
    return located(line_of(container, key))


@contextmanager
def located(place: str) -> Iterator[None]:
    """Put a place, such as "line 7", before the errors that are raised within, but only once."""
    try:
        yield
    except WeightopsError as error:
        if not place or error.fact.startswith("line "):
            raise
        raise error.prefixed(place) from error
