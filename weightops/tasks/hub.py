"""Tasks from data sets on the Hugging Face Hub: CLIP_benchmark's archives, or Parquet files."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.hub.fetch import REPO, fetch, reason
from weightops.tasks.archives import TEXTS, archive_task, is_archive
from weightops.tasks.pictures import read_image
from weightops.tasks.split import split_loader
from weightops.tasks.task import PROMPTS, Images, LazySizes, Task

NAME = re.compile(
    rf"(?P<repo>{REPO})(?:/(?P<config>\w[\w./-]*))?(?:@(?P<revision>[^:@]+))?(?::(?P<label>\w+))?"
)
"""A data set's name: ``org/name``, with ``/config``, ``@revision``, ``:label_column`` after it."""

_PARQUET = re.compile(
    r"(?:(?P<config>.+)/)?(?P<split>train|validation|valid|val|test)(?:[-/][^/]*)?\.parquet"
)


def hub_task(name: str) -> Task:
    """Return the task of a data set on the Hub, whose images are fetched when they are accessed.

    For missing splits see `split_loader`.

    Args:
        name: ``org/name``, of a data set in CLIP_benchmark's layout (see `archive_task`), or of
            Parquet files with a column of images and a column of class labels. If the data set has
            several configurations or label columns, ``org/name/config`` and
            ``org/name:label_column`` name one; ``org/name@revision`` names a commit or branch.

    Raises:
        TaskError: if the data set can't be fetched, or is of neither kind.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise TaskError(
            f"{name} is not the name of a data set",
            hint="name it as ORG/NAME, ORG/NAME/CONFIG or ORG/NAME:LABEL_COLUMN",
        )
    repo, config, revision, label = match.group("repo", "config", "revision", "label")
    repository = _Repository(repo, revision)
    folder = repository.locate([*TEXTS, "README.md"])
    repository.revision = folder.name  # one commit, whatever is pushed meanwhile
    source = f"{repo}@{folder.name} on the Hugging Face Hub"
    short_name = repo.partition("/")[2].removeprefix("wds_")
    task_name = "-".join(filter(None, (short_name, config, label))).replace("/", "-")
    if not is_archive(folder):
        files = _parquet_files(repository.files, repo, config)
        return _parquet_task(task_name, repository, files, label, source)
    if config or label:
        raise TaskError(
            f"{repo} is a set of archives, which has no configurations and no columns",
            hint=f"name it as {repo}",
        )
    return archive_task(task_name, repository.locate, source)


class _Repository:
    """A data set on the Hub, with those of its files that were fetched in the local cache.

    Attributes:
        files: the names of all files, once `locate` has run; without a network, of those fetched.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision = name, revision
        self.files: list[str] = []

    def locate(self, files: Iterable[str]) -> Path:
        """Fetch some files and return the folder that holds them."""
        wanted = list(files)

        def choose(available: list[str]) -> list[str]:
            self.files = available
            return wanted

        try:
            folder = fetch(self.name, choose, revision=self.revision, kind="dataset", known=wanted)
        except Exception as error:  # the library raises whatever its many back ends raise
            raise TaskError(
                f"{self.name} is no folder here, and as a data set can't be fetched from "
                f"the Hugging Face Hub: {reason(error)}"
            ) from error
        if not self.files:
            cached = (path for path in folder.rglob("*") if path.is_file())
            self.files = [path.relative_to(folder).as_posix() for path in cached]
        return folder

    def paths(self, files: Sequence[str], source: str) -> list[str]:
        """Fetch some files and return their paths.

        Raises:
            TaskError: if some are missing.
        """
        folder = self.locate(files)
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise TaskError(f"{source} lacks {missing[0]} ({len(missing)} of {len(files)} files)")
        return [str(folder / file) for file in files]


def _parquet_files(names: Iterable[str], repo: str, config: str | None) -> dict[str, list[str]]:
    """Return the files by split, of the named configuration or of the only one."""
    by_config: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names):
        if match := _PARQUET.fullmatch(name):
            split = "validation" if match["split"].startswith("val") else match["split"]
            by_config[match["config"] or "data"][split].append(name)
    if not by_config:
        raise TaskError(
            f"{repo} holds neither archives as CLIP_benchmark's ({{split}}/0.tar) "
            "nor Parquet files ({split}-*.parquet)"
        )
    if config is None and len(by_config) > 1:
        raise TaskError(
            f"{repo} has several configurations",
            hint=f"name one of {', '.join(f'{repo}/{name}' for name in by_config)}",
        )
    config = config or next(iter(by_config))
    if config not in by_config:
        raise TaskError(f"{repo} has no configuration {config}; it has {', '.join(by_config)}")
    return by_config[config]


@dataclass(frozen=True)
class HubImages:
    """Images in the rows of a data set, decoded when they are accessed.

    Attributes:
        rows: the rows, with encoded images.
        column: the name of the column of images.
        labels: class indices, shape ``(n,)``.
        source: what errors call the data set.
    """

    rows: Any
    column: str
    labels: npt.NDArray[np.int64]
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        cell = self.rows[int(index)][self.column] or {}
        content = io.BytesIO(cell.get("bytes") or b"")
        return read_image(content, f"{self.column} of row {index} of {self.source}")


def _parquet_task(
    name: str,
    repository: _Repository,
    files: Mapping[str, Sequence[str]],
    label: str | None,
    source: str,
) -> Task:
    """Return the task of Parquet files, given by split; ``label`` names the column of labels."""
    first_file = repository.paths(next(iter(files.values()))[:1], source)[0]
    image, label, classes = _parquet_columns(first_file, label, source)

    def read(split: str) -> Images:
        paths = repository.paths(files[split], source)
        return _read_parquet(paths, image, label, len(classes), f"{split} of {source}", source)

    available = [
        split
        for split in files
        if split != "test" or not _labels_hidden(repository.paths(files[split][:1], source), label)
    ]
    load = split_loader(read, available, source)
    return Task(name, classes, PROMPTS, load, LazySizes(load), source, "see the data set's page")


def _parquet_columns(path: str, label: str | None, source: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the names of the columns of images and labels, and the names of the classes."""
    from datasets import ClassLabel, Features, Image
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema

    try:
        features = Features.from_arrow_schema(read_schema(path))
    except (ArrowException, OSError, ValueError) as error:
        raise TaskError(
            f"{source} has a Parquet file that can't be read: {reason(error)}"
        ) from error
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    if not images or not labels:
        raise TaskError(
            f"{source} needs a column of images and one of class labels; "
            f"it has {', '.join(features)}"
        )
    hint = f"name a column behind a colon, one of {', '.join(labels)}"
    if label and label not in labels:
        raise TaskError(f"{source} has no column of class labels called {label}", hint=hint)
    if not label and len(labels) > 1:
        raise TaskError(f"{source} has several columns of class labels", hint=hint)
    label = label or labels[0]
    return images[0], label, tuple(str(c).replace("_", " ") for c in features[label].names)


def _read_parquet(
    paths: Sequence[str], image: str, label: str, classes: int, split: str, source: str
) -> HubImages:
    """Return the images of a split; ``split`` is what errors call it."""
    from datasets import Image, load_dataset

    try:
        rows = load_dataset("parquet", data_files=list(paths), split="train")
        rows = rows.cast_column(image, Image(decode=False))
    except Exception as error:  # the library raises whatever its many back ends raise
        raise TaskError(f"{source} can't be read: {reason(error)}") from error
    labels = [-1 if value is None else int(value) for value in rows[label]]
    unlabelled = [i for i, value in enumerate(labels) if not 0 <= value < classes]
    if unlabelled:
        raise TaskError(
            f"{len(unlabelled)} rows of {split} have no label in {label}, "
            f"row {unlabelled[0]} the first"
        )
    return HubImages(rows, image, np.array(labels, dtype=np.int64), source)


def _labels_hidden(paths: Sequence[str], label: str) -> bool:
    """Return whether a split's labels are withheld, as those of a challenge's test are."""
    from pyarrow.parquet import read_table

    values = read_table(paths[0], columns=[label])[label].to_pylist()
    return all(value is None or value < 0 for value in values)
