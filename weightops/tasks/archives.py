"""Tasks from CLIP_benchmark's archives: tar files of pictures, each with its class or its captions, beside lists of classes and prompts."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from weightops.errors import TaskError
from weightops.tasks.split import three_splits
from weightops.tasks.task import (
    PROMPTS,
    SPLITS,
    Captions,
    Images,
    Sizes,
    Task,
    read_lines,
    read_picture,
    read_prompts,
)

CLASSES, TEMPLATES, KIND, COUNT = (
    "classnames.txt",
    "zeroshot_classification_templates.txt",
    "dataset_type.txt",
    "nshards.txt",
)
TEXTS = (CLASSES, TEMPLATES, KIND, *(f"{split}/{COUNT}" for split in SPLITS))
"""The small files that describe a set."""


class Member(NamedTuple):
    """A file in an archive."""

    archive: Path
    name: str
    start: int
    size: int

    def read(self) -> bytes:
        """Its content."""
        with open(self.archive, "rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)


@dataclass(frozen=True)
class ArchiveImages:
    """Pictures in archives, read when they are asked for."""

    pictures: Sequence[Member]
    labels: npt.NDArray[np.int64]
    captions: Captions | None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Image.Image:
        member = self.pictures[index]
        return read_picture(BytesIO(member.read()), f"{member.name} in {member.archive}")


def is_archive(folder: Path) -> bool:
    """True for a folder that is laid out as CLIP_benchmark's data sets are."""
    return any((folder / split / COUNT).is_file() for split in SPLITS)


def archive_task(name: str, place: Callable[[Iterable[str]], Path], source: str) -> Task:
    """A task from ``{split}/{i}.tar``, ``{split}/nshards.txt``, ``classnames.txt`` and ``zeroshot_classification_templates.txt``.

    In an archive ``KEY.png`` (or ``jpg``, ``webp``) is a picture, ``KEY.cls`` the number of its class, ``KEY.txt`` its captions, one a
    line. For the splits that a set lacks, see `three_splits`.

    Args:
        name: of the task.
        place: the folder that has some files of the set, after they have been fetched if need be.
        source: where the images come from.

    Raises:
        TaskError: if it isn't laid out so, or is of a kind that can't be scored.
    """
    folder = place(TEXTS)
    classes = _classes(folder / CLASSES)
    templates = (
        read_prompts(folder / TEMPLATES, "{c}") if (folder / TEMPLATES).is_file() else PROMPTS
    )
    if (folder / KIND).is_file() and "multilabel" in read_lines(folder / KIND):
        raise TaskError(f"{source} has several labels an image, which weightops can't score")
    shards = {
        split: _count(folder / split / COUNT)
        for split in SPLITS
        if (folder / split / COUNT).is_file()
    }

    def read(split: str) -> Images:
        names = [f"{split}/{i}.tar" for i in range(shards[split])]
        there = place(names)
        missing = [shard for shard in names if not (there / shard).is_file()]
        if missing:
            raise TaskError(
                f"{source} lacks {missing[0]} ({len(missing)} of {len(names)} archives)"
            )
        return read_archives([there / shard for shard in names], len(classes))

    load = three_splits(read, shards, source)
    return Task(name, classes, templates, load, Sizes(load), source, "see the data set's page")


def read_archives(archives: Sequence[Path], classes: int) -> ArchiveImages:
    """The pictures of some archives, in their order.

    Args:
        archives: tar files.
        classes: how many classes there are: their numbers are smaller.

    Raises:
        TaskError: naming the archive, or the file in it, that isn't as it should be.
    """
    pictures, labels, captions = [], [], []
    for archive in tqdm(archives, desc="archives", delay=1, leave=False):
        for key, parts in _samples(archive):
            picture = next(
                (parts[suffix] for suffix in ("png", "jpg", "jpeg", "webp") if suffix in parts),
                None,
            )
            if picture is None or not ("cls" in parts or "txt" in parts):
                raise TaskError(
                    f"{key} in {archive} has no {'picture' if picture is None else 'class (.cls) and no captions (.txt)'}"
                )
            pictures.append(picture)
            if "cls" in parts:
                labels.append(_label(parts["cls"], classes))
            if "txt" in parts:
                text = parts["txt"].read().decode(errors="replace")
                captions.append(tuple(line.strip() for line in text.splitlines() if line.strip()))
                if not captions[-1]:
                    raise TaskError(f"{parts['txt'].name} in {archive} is empty")
    for kind, found in (("classes", labels), ("captions", captions)):
        if found and len(found) < len(pictures):
            raise TaskError(
                f"{len(pictures) - len(found)} of {len(pictures)} pictures in {archives[0].parent} have no {kind}"
            )
    truth = np.array(labels, dtype=np.int64) if labels else np.zeros(len(pictures), dtype=np.int64)
    return ArchiveImages(pictures, truth, captions or None)


def _samples(archive: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """The files of an archive by the names before their first dot; those of one name follow each other."""
    held: dict[str, Member] = {}
    last = None
    try:
        with tarfile.open(archive, "r:") as tar:
            for info in tar:
                file = info.name.rpartition("/")[2]
                if not info.isreg() or info.issparse() or file.startswith("."):
                    continue
                stem, _, suffix = file.partition(".")
                key = info.name.removesuffix(file) + stem
                if key != last and held:
                    yield str(last), held
                    held = {}
                last = key
                held[suffix.lower()] = Member(archive, info.name, info.offset_data, info.size)
            if tar.offset >= archive.stat().st_size:  # an empty block ends it
                raise TaskError(f"{archive} is cut short: the download or copy is incomplete")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise TaskError(f"{archive} is not an archive that can be read: {error}") from error
    if held:
        yield str(last), held


def _label(member: Member, classes: int) -> int:
    text = member.read().strip()
    if not text.isdigit() or int(text) >= classes:
        raise TaskError(
            f"{member.name} in {member.archive} is {text[:20]!r}, not the number of one of {classes} classes"
        )
    return int(text)


def _classes(path: Path) -> tuple[str, ...]:
    """The names of classes, one a line, by their numbers; none where there is no such file."""
    if not path.is_file():
        return ()
    read_lines(path)
    names = path.read_text(encoding="utf-8").rstrip().splitlines()
    blank = [i for i, name in enumerate(names) if not name.strip()]
    if blank:
        raise TaskError(f"{path} has no name for class {blank[0]}")
    return tuple(name.strip() for name in names)


def _count(path: Path) -> int:
    text = " ".join(read_lines(path))
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise TaskError(f"{path} should hold the number of archives, not {text[:20]!r}")
    return int(text)
