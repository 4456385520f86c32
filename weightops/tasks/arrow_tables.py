"""Tasks from Parquet or Arrow files with a column of images and a column of labels."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.hub.fetch import reason
from weightops.support.text import first_few
from weightops.tasks.class_names import in_words
from weightops.tasks.copies import compared
from weightops.tasks.pictures import read_image
from weightops.tasks.split import split_loader
from weightops.tasks.task import PROMPTS, Images, LazySizes, Task, digest_of_files

log = logging.getLogger("weightops")

_STRINGS = ("string", "large_string")

Paths = Callable[[Sequence[str], str], list[str]]
"""Fetch files of a data set, which errors call by the second argument, and return their paths."""


@dataclass(frozen=True)
class TableImages:
    """Images in the rows of a data set, decoded when they are accessed.

    Attributes:
        rows: the rows, with encoded images.
        column: the name of the column of images.
        labels: class indices, shape ``(n,)``.
        source: what errors call the data set.
        files: the files that the rows are in.
    """

    rows: Any
    column: str
    labels: npt.NDArray[np.int64]
    source: str
    files: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        name = f"{self.column} of row {index} of {self.source}"
        return read_image(io.BytesIO(self.encoded(index)), name)

    def encoded(self, index: int, most: int = -1) -> bytes:
        """Return the content of the file of an image."""
        content = self._contents[int(index)].as_buffer() or b""
        return bytes(content if most < 0 else content[:most])

    def encoded_size(self, index: int) -> int | None:
        """Return the size of the file of an image; None where a row has none."""
        return int(self._sizes[index]) or None

    @cached_property
    def _contents(self) -> Any:
        """The contents of the files, in the rows' order."""
        from pyarrow.compute import struct_field

        return struct_field(self.rows.data.column(self.column), "bytes")

    @cached_property
    def _sizes(self) -> npt.NDArray[np.int64]:
        from pyarrow.compute import binary_length

        sizes: npt.NDArray[np.int64] = binary_length(self._contents).fill_null(0).to_numpy()
        return sizes

    def digest(self) -> str:
        """Return what tells the images from all others."""
        return digest_of_files(map(Path, self.files), "upright", self.column)


@dataclass(frozen=True)
class _Columns:
    """The columns of images and labels, and the names of the classes in the order of labels."""

    image: str
    label: str
    classes: tuple[str, ...]


def table_task(
    name: str, paths: Paths, files: Mapping[str, Sequence[str]], columns: str | None, source: str
) -> Task:
    """Return the task of Parquet or Arrow files, given by split.

    Classes are in the order of the column's ``ClassLabel``; those of another file are matched by
    name. Strings are classes in sorted order.

    Args:
        name: the name of the task.
        paths: fetches files.
        files: split -> its files.
        columns: the name of the column of images or labels, or both with a colon between them.
        source: what errors call the data set.

    Raises:
        TaskError: if there are no such columns, or several, or files that can't be read.
    """
    first = "train" if "train" in files else next(iter(files))
    features = _features(paths(files[first][:1], source)[0], source)
    image, label = _find_columns(features, columns, source)
    names = getattr(features[label], "names", None)
    if names is None:  # the strings of all files are needed
        names = _strings(paths(files[first], source), label, source)
    known = _Columns(image, label, tuple(map(str, names)))

    def read(split: str) -> Images:
        found = paths(files[split], source)
        return _read_split(found, known, f"{split} of {source}", source)

    available = list(files)
    if "test" in files and all(
        _labels_hidden(paths([file], source)[0], label, source) for file in files["test"]
    ):
        log.warning("the test split of %s has no labels: its pictures aren't used", source)
        available.remove("test")
    load = split_loader(compared(read, source), available, source)
    spoken = tuple(map(in_words, known.classes))
    license = "see the data set's page"
    return Task(name, spoken, PROMPTS, load, LazySizes(load), source, license, known.classes)


def _features(path: str, source: str) -> Any:
    """Return the features of a file."""
    from datasets import Features
    from pyarrow.parquet import read_schema

    with _reading(path, source):
        schema = _arrow_table(path).schema if _is_arrow(path) else read_schema(path)
        return Features.from_arrow_schema(schema)


@contextmanager
def _reading(path: str, source: str) -> Iterator[None]:
    """Translate errors of a file that can't be read."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError, KeyError) as error:
        raise TaskError(
            f"{source} has a table that can't be read, {Path(path).name}: {reason(error)}"
        ) from error


def _is_arrow(path: str) -> bool:
    return path.endswith(".arrow")


def _arrow_table(path: str) -> Any:
    """Return the table of an Arrow file, which is mapped, not read."""
    from pyarrow import memory_map
    from pyarrow.ipc import open_stream

    return open_stream(memory_map(path)).read_all()


def _find_columns(features: Any, columns: str | None, source: str) -> tuple[str, str]:
    """Return the names of the columns of images and labels."""
    from datasets import ClassLabel, Image, Value

    named = columns.split(":") if columns else []
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    texts = [c for c, f in features.items() if isinstance(f, Value) and f.dtype in _STRINGS]
    labels = labels + [c for c in texts if c in named] if labels else texts
    if not images or not labels:
        raise TaskError(
            f"{source} needs a column of images and one of class labels; "
            f"it has {', '.join(features)}"
        )
    unknown = [name for name in named if name not in (*images, *labels)]
    if unknown:
        raise TaskError(
            f"{source} has no column of class labels called {unknown[0]}",
            hint=f"name a column behind a colon, one of {', '.join((*labels, *images))}",
        )
    chosen = []
    for kind, candidates in (("images", images), ("class labels", labels)):
        among = [name for name in candidates if name in named] or candidates
        if len(among) > 1:
            raise TaskError(
                f"{source} has several columns of {kind}",
                hint=f"name a column behind a colon, one of {', '.join(among)}",
            )
        chosen += among
    return chosen[0], chosen[1]


def _strings(paths: Sequence[str], label: str, source: str) -> list[str]:
    """Return the different strings of a column of labels in sorted order."""
    return sorted({value for path in paths for value in _values(path, label, source) if value})


def _values(path: str, label: str, source: str) -> list[Any]:
    from pyarrow.parquet import read_table

    with _reading(path, source):
        table = _arrow_table(path) if _is_arrow(path) else read_table(path, columns=[label])
        values: list[Any] = table[label].to_pylist()
    return values


def _read_split(paths: Sequence[str], known: _Columns, split: str, source: str) -> TableImages:
    """Return the images of a split; ``split`` is what errors call it."""
    from datasets import Dataset, Image, concatenate_datasets, load_dataset

    labels = [index for path in paths for index in _labels_of(path, known, split, source)]
    unlabelled = [i for i, value in enumerate(labels) if value < 0]
    if unlabelled:
        raise TaskError(
            f"{len(unlabelled)} rows of {split} have no label in {known.label}, "
            f"row {unlabelled[0]} the first"
        )
    try:
        if all(map(_is_arrow, paths)):
            mapped = concatenate_datasets([Dataset.from_file(path) for path in paths])
            parts = mapped.select_columns([known.image])
        else:
            files = list(map(escape, paths))  # the library takes them for patterns
            parts = load_dataset("parquet", data_files=files, columns=[known.image], split="train")
        rows = parts.cast_column(known.image, Image(decode=False))
    except Exception as error:  # the library raises whatever its many back ends raise
        raise TaskError(f"{source} can't be read: {reason(error)}") from error
    cell = (rows[0][known.image] if len(rows) else None) or {}
    if cell and cell.get("bytes") is None:
        raise TaskError(
            f"{split} has paths of images in {known.image} ({cell.get('path')}), and no images",
            hint="write the images into the Parquet files, as push_to_hub of datasets does",
        )
    return TableImages(rows, known.image, np.array(labels, dtype=np.int64), source, paths)


def _labels_of(path: str, known: _Columns, split: str, source: str) -> list[int]:
    """Return the class of each row of a file, by name; -1 for rows without one."""
    values = _values(path, known.label, source)
    names = getattr(_features(path, source)[known.label], "names", None)
    index = {name: i for i, name in enumerate(known.classes)}
    if names is not None:
        values = [
            names[value] if value is not None and 0 <= value < len(names) else None
            for value in values
        ]
    values = [None if value == "" else value for value in values]
    unknown = sorted({value for value in values if value is not None and value not in index})
    if unknown:
        raise TaskError(
            f"{split} has classes that the first file of the data set doesn't have: "
            f"{first_few(unknown)}"
        )
    return [-1 if value is None else index[value] for value in values]


def _labels_hidden(path: str, label: str, source: str) -> bool:
    """Return whether a file's labels are withheld, as those of a challenge's test are."""
    values = _values(path, label, source)
    return all(value is None or (isinstance(value, int) and value < 0) for value in values)
