"""Check the folders of classes: what is in them, and what a table beside them says."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from weightops.errors import TaskError
from weightops.support.text import first_few
from weightops.tasks.pictures import is_left_behind, picture_suffixes, places
from weightops.tasks.split_names import NO_PICTURES, PICTURES, looks_like_split, split_of

log = logging.getLogger("weightops")

_TABLES = (".csv", ".tsv", ".jsonl")
_METADATA = "metadata.parquet"
_MOST_ROWS = 20_000
"""The rows of a table that are compared with the pictures."""

LabelledFile = tuple[Path, str]
"""The path of an image and the name of its class."""


def check_inner_folders(class_folders: Iterable[Path]) -> None:
    """Refuse splits and masks inside of classes; say that other inner folders are one class.

    Raises:
        TaskError: naming the folder.
    """
    merged: list[Path] = []
    for class_folder in class_folders:
        for place in islice(places(class_folder), 1, None):
            name = place.name.lower()
            if name in PICTURES - NO_PICTURES or not any(map(_is_named_picture, place.iterdir())):
                continue
            if name in NO_PICTURES or split_of(name) or looks_like_split(name):
                raise TaskError(
                    f"{place} is inside of the class {class_folder.name}, and seems to be a split, "
                    "or to hold masks",
                    hint="folders of classes are in those of splits, as in train/cat and test/cat; "
                    "move masks and the like elsewhere",
                )
            merged.append(place.relative_to(class_folder.parent))
    if merged:
        log.warning(
            "%s: the upper folder is the class; if the lower ones are, name the folder that holds "
            "them",
            first_few(map(str, merged)),
        )


def _is_named_picture(path: Path) -> bool:
    return path.suffix.lower() in picture_suffixes() and not is_left_behind(path.name)


def check_tables(folder: Path, labelled: Sequence[LabelledFile]) -> None:
    """Refuse a table beside folders of classes that lists the pictures with other classes.

    Such are ``metadata.csv`` and ``metadata.jsonl`` of `datasets`, where the folders may be mere
    parts. A table agrees if one of its columns stands for the folders, by whatever names.

    Args:
        folder: the folder of the tables.
        labelled: the pictures and their classes.

    Raises:
        TaskError: naming the table and its columns.
    """
    tables = [path for path in sorted(folder.iterdir()) if _is_table(path)]
    if not tables:
        return
    known = _by_name(folder, labelled)
    for table in tables:
        rows = list(islice(_rows(table), _MOST_ROWS))
        columns = _other_columns(rows, known)
        if columns:
            raise TaskError(
                f"{table} lists the pictures with {first_few(columns)}, and the folders "
                f"{first_few(sorted({label for _, label in labelled}))} agree with none of these",
                hint="sort the pictures into folders by class; or move the file elsewhere, and the "
                "folders are the classes",
            )


def _is_table(path: Path) -> bool:
    named = path.suffix.lower() in _TABLES or path.name == _METADATA
    return named and path.is_file() and not is_left_behind(path.name)


def _by_name(folder: Path, labelled: Sequence[LabelledFile]) -> dict[str, LabelledFile | None]:
    """Return the picture of each name that a table may give it; None for several pictures."""
    known: dict[str, LabelledFile | None] = {}
    for picture in labelled:
        for end in _ends(picture[0].relative_to(folder).as_posix()):
            for name in (end, end.removesuffix(picture[0].suffix)):
                known[name] = None if name in known else picture
    return known


def _ends(path: str) -> Iterator[str]:
    """Yield the last parts of a path, the longest first."""
    parts = path.replace("\\", "/").split("/")
    yield from ("/".join(parts[start:]) for start in range(max(0, len(parts) - 4), len(parts)))


def _rows(table: Path) -> Iterator[Mapping[str, str]]:
    """Yield the rows of a table; nothing of what isn't one."""
    if table.name == _METADATA:
        yield from _parquet_rows(table)
        return
    with (
        suppress(OSError, ValueError, csv.Error),
        open(table, encoding="utf-8-sig", errors="replace", newline="") as lines,
    ):
        if table.suffix.lower() == ".jsonl":
            for line in lines:
                row = json.loads(line) if line.strip() else None
                if isinstance(row, dict):
                    yield {key: str(value) for key, value in row.items()}
            return
        header = lines.readline()
        lines.seek(0)
        delimiter = max(",;\t|", key=header.count)
        for row in csv.DictReader(lines, delimiter=delimiter, restkey="", restval=""):
            yield {str(key): str(value) for key, value in row.items()}


def _parquet_rows(table: Path) -> Iterator[Mapping[str, str]]:
    from pyarrow import ArrowException, types
    from pyarrow.parquet import ParquetFile

    with suppress(OSError, ArrowException):
        file = ParquetFile(table)
        names = [
            field.name
            for field in file.schema_arrow
            if types.is_string(field.type) or types.is_integer(field.type)
        ]
        for row in file.read(names).to_pylist():
            yield {key: str(value) for key, value in row.items()}


def _other_columns(
    rows: Sequence[Mapping[str, str]], known: Mapping[str, LabelledFile | None]
) -> list[str]:
    """Return the columns that may be classes of pictures; none if one agrees with the folders."""
    columns = dict.fromkeys(column for row in rows[:100] for column in row)
    found = {column: [_picture(row.get(column, ""), known) for row in rows] for column in columns}
    listing = max(found, key=lambda c: sum(p is not None for p in found[c]), default=None)
    if listing is None:
        return []
    pairs = [(row, p[1]) for row, p in zip(rows, found[listing], strict=True) if p is not None]
    if 2 * len(pairs) < min(len(rows), len({p for p in known.values() if p is not None})):
        return []
    labels = {label for _, label in pairs}
    others = []
    for column in columns:
        values = [row.get(column, "") for row, _ in pairs]
        kinds = set(values)
        both = set(zip(values, (label for _, label in pairs), strict=True))
        if len(labels) > 1 and len(both) == len(kinds) == len(labels):
            return []
        if 1 < len(kinds) <= len(pairs) / 2 and "" not in kinds:
            others.append(column)
    return others


def _picture(cell: str, known: Mapping[str, LabelledFile | None]) -> LabelledFile | None:
    return next((p for end in _ends(cell) if (p := known.get(end)) is not None), None)
