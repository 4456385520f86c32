"""Tasks whose images come from data sets on the Hugging Face Hub: CLIP_benchmark's archives, or Parquet files with images and labels."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.hub.fetch import REPO, fetch, reason
from weightops.tasks.archives import TEXTS, archive_task, is_archive
from weightops.tasks.split import three_splits
from weightops.tasks.task import PROMPTS, Images, Sizes, Task, read_picture

NAME = re.compile(
    rf"(?P<repo>{REPO})(?:/(?P<config>\w[\w./-]*))?(?:@(?P<revision>[^:@]+))?(?::(?P<label>\w+))?"
)
"""How a data set is named: ``org/name``, ``org/name/config``, ``org/name@revision``, ``org/name:label_column``."""

_PARQUET = re.compile(
    r"(?:(?P<config>.+)/)?(?P<split>train|validation|valid|val|test)(?:[-/][^/]*)?\.parquet"
)


@dataclass(frozen=True)
class HubImages:
    """Rows of a data set with an image and a label column; images are as the files hold them."""

    rows: Any
    image: str
    labels: npt.NDArray[np.int64]
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        cell = self.rows[int(index)][self.image] or {}
        return read_picture(
            io.BytesIO(cell.get("bytes") or b""), f"{self.image} of row {index} of {self.source}"
        )


def hub_task(name: str) -> Task:
    """A task over a data set on the Hub; its images are fetched when they are needed.

    For the splits that a set lacks, see `three_splits`.

    Args:
        name: ``org/name``, of archives as CLIP_benchmark's (see `archive_task`), or of Parquet files with a column of images and one of
            class labels; with ``/config``, ``@revision`` and ``:label_column`` where these must be told.

    Raises:
        TaskError: if it can't be had, or isn't of these two kinds.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise TaskError(
            f"{name} is not the name of a data set: it is ORG/NAME, ORG/NAME/CONFIG or ORG/NAME:LABEL_COLUMN"
        )
    repo, config, revision, label = match.group("repo", "config", "revision", "label")
    names: list[str] = []

    def place(wanted: Iterable[str]) -> Path:
        chosen = list(wanted)

        def choose(every: list[str]) -> list[str]:
            names[:] = every
            return chosen

        try:
            folder = fetch(repo, choose, revision=revision, kind="dataset", known=chosen)
        except Exception as error:  # the library raises whatever its many back ends raise
            raise TaskError(
                f"{repo} is no folder here, and as a data set can't be had from the Hugging Face Hub: {reason(error)}"
            ) from error
        names[:] = names or [
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        ]
        return folder

    folder = place([*TEXTS, "README.md"])
    revision = folder.name  # one state of the set, whatever is pushed meanwhile
    source = f"{repo}@{folder.name} on the Hugging Face Hub"
    called = "-".join(
        [repo.partition("/")[2].removeprefix("wds_"), *filter(None, (config, label))]
    ).replace("/", "-")
    if not is_archive(folder):
        return _parquet_task(called, place, _parquet_files(names, repo, config), label, source)
    if config or label:
        raise TaskError(
            f"{repo} is a set of archives, which has no configurations and no columns: name it alone"
        )
    return archive_task(called, place, source)


def _parquet_files(names: Iterable[str], repo: str, config: str | None) -> Mapping[str, list[str]]:
    """Split -> files, of the one configuration there is, or of the one that is meant."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names):
        if match := _PARQUET.fullmatch(name):
            split = "validation" if match["split"].startswith("val") else match["split"]
            found[match["config"] or "data"][split].append(name)
    if not found:
        raise TaskError(
            f"{repo} holds neither archives as CLIP_benchmark's ({{split}}/0.tar) nor Parquet files ({{split}}-*.parquet)"
        )
    if config is None and len(found) > 1:
        raise TaskError(
            f"{repo} has several configurations: name one of {', '.join(f'{repo}/{name}' for name in found)}"
        )
    config = config or next(iter(found))
    if config not in found:
        raise TaskError(f"{repo} has no configuration {config}; it has {', '.join(found)}")
    return found[config]


def _parquet_task(
    name: str,
    place: Callable[[Iterable[str]], Path],
    files: Mapping[str, list[str]],
    label: str | None,
    source: str,
) -> Task:
    from datasets import ClassLabel, Features, Image, load_dataset
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema, read_table

    def there(wanted: list[str]) -> list[str]:
        folder = place(wanted)
        missing = [file for file in wanted if not (folder / file).is_file()]
        if missing:
            raise TaskError(f"{source} lacks {missing[0]} ({len(missing)} of {len(wanted)} files)")
        return [str(folder / file) for file in wanted]

    try:
        features = Features.from_arrow_schema(read_schema(there(next(iter(files.values()))[:1])[0]))
    except (ArrowException, OSError, ValueError) as error:
        raise TaskError(
            f"{source} has a Parquet file that can't be read: {reason(error)}"
        ) from error
    image = next(
        (column for column, feature in features.items() if isinstance(feature, Image)), None
    )
    labels = {
        column: feature for column, feature in features.items() if isinstance(feature, ClassLabel)
    }
    if image is None or not labels:
        raise TaskError(
            f"{source} needs a column of images and one of class labels; it has {', '.join(features)}"
        )
    if label not in labels and (label or len(labels) > 1):
        what = (
            "no column of class labels called " + label
            if label
            else "several columns of class labels"
        )
        raise TaskError(f"{source} has {what}: name one behind a colon, of {', '.join(labels)}")
    label = label or next(iter(labels))
    classes = tuple(str(c).replace("_", " ") for c in labels[label].names)

    def read(split: str) -> Images:
        paths = there(files[split])
        try:
            rows = load_dataset("parquet", data_files=paths, split="train").cast_column(
                image, Image(decode=False)
            )
        except Exception as error:  # the library raises whatever its many back ends raise
            raise TaskError(f"{source} can't be read: {reason(error)}") from error
        found = [-1 if value is None else int(value) for value in rows[label]]
        odd = [i for i, value in enumerate(found) if not 0 <= value < len(classes)]
        if odd:
            raise TaskError(
                f"{len(odd)} rows of {split} of {source} have no label in {label}, row {odd[0]} the first"
            )
        return HubImages(rows, image, np.array(found, dtype=np.int64), source)

    def hidden(split: str) -> bool:
        """True if a split's labels are kept from the public, as of challenges' tests."""
        first = read_table(there(files[split][:1])[0], columns=[label])[label].to_pylist()
        return all(value is None or value < 0 for value in first)

    have = [
        split for split in files if split != "test" or not hidden(split)
    ]  # its first file is here already
    load = three_splits(read, have, source)
    return Task(name, classes, PROMPTS, load, Sizes(load), source, "see the data set's page")
