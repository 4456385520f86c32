"""Tasks from data sets as on the Hugging Face Hub: CLIP_benchmark's archives, or tables."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from weightops.errors import TaskError
from weightops.hub.fetch import REPO, fetch, reason
from weightops.support.text import portable
from weightops.tasks.archives import TEXTS, archive_task, is_archive
from weightops.tasks.arrow_tables import table_task
from weightops.tasks.split_names import SPLIT_NAMES, one_name_each
from weightops.tasks.task import Task

log = logging.getLogger("weightops")

NAME = re.compile(
    rf"(?P<repo>{REPO})(?:/(?P<config>\w[\w./-]*))?(?:@(?P<revision>[^:@]+))?"
    r"(?::(?P<columns>\w+(?::\w+)?))?"
)
"""A data set's name: ``org/name``, with ``/config``, ``@revision``, and ``:column`` after it, or
``:column:column`` for the columns of images and labels."""

_PLACE = re.compile(r"(.+?):(\w+(?::\w+)?)")
"""A path and the columns after it."""

_TABLE = re.compile(
    r"(?:(?P<config>.+)/)?(?P<split>[^/]+?)"
    r"(?:(?:-\d[^/]*|/[^/]*)?\.parquet|/data-\d+-of-\d+\.arrow)"
)
_KNOWN_SPLIT = re.compile(
    rf"(?:(?P<config>.+)/)?(?P<split>{'|'.join(SPLIT_NAMES)})"
    r"(?:(?:[-/][^/]*)?\.parquet|/data-\d+-of-\d+\.arrow)",
    re.IGNORECASE,
)
"""Parquet files, and those that `save_to_disk` of datasets writes."""


def hub_task(name: str) -> Task:
    """Return the task of a data set on the Hub, whose images are fetched when they are accessed.

    For missing splits see `split_loader`.

    Args:
        name: ``org/name``, of a data set in CLIP_benchmark's layout (see `archive_task`), or of
            Parquet files with a column of images and a column of class labels or of strings. If the
            data set has several configurations or columns, ``org/name/config`` and
            ``org/name:column`` name one, ``org/name:image_column:label_column`` both columns;
            ``org/name@revision`` names a commit or branch.

    Raises:
        TaskError: if the data set can't be fetched, or is of neither kind.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise TaskError(
            f"{name} is not the name of a data set",
            hint="name it as ORG/NAME, ORG/NAME/CONFIG or ORG/NAME:LABEL_COLUMN",
        )
    repo, config, revision, columns = match.group("repo", "config", "revision", "columns")
    repository = _Repository(repo, revision)
    folder = repository.locate([*TEXTS, "README.md"])
    repository.revision = folder.name  # one commit, whatever is pushed meanwhile
    source = f"{repo}@{folder.name} on the Hugging Face Hub"
    short_name = repo.partition("/")[2].removeprefix("wds_")
    task_name = "-".join(filter(None, (short_name, config, columns)))
    task_name = re.sub("[/:]", "-", task_name)
    if not is_archive(folder):
        files = _table_files(repository.files, repo, config)
        return table_task(task_name, repository.paths, files, columns, source)
    if config or columns:
        raise TaskError(
            f"{repo} is a set of archives, which has no configurations and no columns",
            hint=f"name it as {repo}",
        )
    return archive_task(task_name, repository.locate, source)


def local_table(name: str) -> tuple[Path, str | None] | None:
    """Return the folder of tables that a name leads to, and its columns; None if it doesn't.

    Args:
        name: a path, with ``:column`` or ``:image_column:label_column`` after it or not.

    Raises:
        TaskError: if the folder is a single split.
    """
    match = None if Path(name).exists() else _PLACE.fullmatch(name)
    place, columns = match.groups() if match else (name, None)
    folder = Path(place)
    if (folder / "dataset_info.json").is_file() and any(folder.glob("*.arrow")):
        raise TaskError(
            f"{place} is one split that save_to_disk of datasets wrote",
            hint="save a DatasetDict with train and test, and name its folder",
        )
    return (folder, columns) if folder.is_dir() and _local_files(folder) else None


def _local_files(folder: Path) -> list[str]:
    """Return the tables in a folder and in those in it, but for pictures' metadata.

    There are none if no split is known.
    """
    patterns = ("*.parquet", "*/*.parquet", "*/*.arrow")
    found = (path for pattern in patterns for path in folder.glob(pattern))
    names = [p.relative_to(folder).as_posix() for p in found if p.stem != "metadata"]
    return names if any(map(_KNOWN_SPLIT.fullmatch, names)) else []


def local_table_task(folder: Path, columns: str | None) -> Task:
    """Return the task of a folder of Parquet files named as those on the Hub, or of `save_to_disk`.

    Args:
        folder: the folder, of one configuration.
        columns: the columns of images and labels, see `hub_task`.

    Raises:
        TaskError: as `hub_task`.
    """
    files = _table_files(_local_files(folder), str(folder), None)

    def paths(files: Sequence[str], _: str) -> list[str]:
        return [str(folder / file) for file in files]

    source = f"the folder {portable(str(folder))}"
    return table_task(folder.resolve().name, paths, files, columns, source)


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


def _table_files(names: Iterable[str], repo: str, config: str | None) -> dict[str, list[str]]:
    """Return the files by split, of the named configuration or of the only one.

    Files of splits that aren't scored, such as ``extra``, are left out with a warning.
    """
    by_config: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    others: dict[str, set[str]] = defaultdict(set)
    available = sorted(names)
    for name in [n for n in available if n.endswith(".parquet")] or available:
        if match := _KNOWN_SPLIT.fullmatch(name):
            by_config[match["config"] or "data"][match["split"]].append(name)
        elif match := _TABLE.fullmatch(name):
            others[match["config"] or "data"].add(match["split"])
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
    if others[config]:
        log.warning("%s: not used, as no split is called so: %s", repo, ", ".join(others[config]))
    chosen = by_config[config]
    return {split: chosen[name] for split, name in one_name_each(chosen, repo).items()}
