"""Tasks in CLIP_benchmark's layout: tar archives of images, beside lists of classes and prompts."""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from typing_extensions import Self

from weightops.errors import TaskError
from weightops.support.progress import tracked
from weightops.support.text import first_few
from weightops.tasks.copies import compared
from weightops.tasks.pictures import is_left_behind, read_image
from weightops.tasks.split import split_loader
from weightops.tasks.split_names import HINT, SPLIT_NAMES, one_name_each, split_of
from weightops.tasks.task import (
    PROMPTS,
    Captions,
    Images,
    LazySizes,
    Task,
    digest_of_files,
    read_lines,
    read_prompts,
)

log = logging.getLogger("weightops")

CLASSES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
KIND = "dataset_type.txt"
COUNT = "nshards.txt"
TEXTS = (CLASSES, TEMPLATES, KIND, *(f"{name}/{COUNT}" for name in SPLIT_NAMES))
"""The small files that describe a data set."""

_LARGEST_NOTE = 1_000_000
"""The most bytes of what isn't a file in an archive, such as a long name."""

_IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")


class Member(NamedTuple):
    """A file inside an archive."""

    archive: Path
    name: str
    start: int
    size: int

    def read(self, most: int = -1) -> bytes:
        """Return the content of the file, or its first ``most`` bytes."""
        with open(self.archive, "rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size if most < 0 else min(most, self.size))


@dataclass(frozen=True)
class ArchiveImages:
    """Images inside archives, each read when it is accessed, as it is stored.

    CLIP_benchmark doesn't turn photographs as their EXIF orientation says.
    """

    members: Sequence[Member]
    labels: npt.NDArray[np.int64]
    captions: Captions | None

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Image.Image:
        member = self.members[index]
        name = f"{member.name} in {member.archive}"
        return read_image(BytesIO(member.read()), name, upright=False)

    def encoded(self, index: int, most: int = -1) -> bytes:
        """Return the content of the file of an image."""
        return self.members[index].read(most)

    def encoded_size(self, index: int) -> int:
        """Return the size of the file of an image."""
        return self.members[index].size

    def digest(self) -> str:
        """Return what tells the images from all others."""
        archives = dict.fromkeys(member.archive for member in self.members)
        places = (f"{m.archive} {m.name} {m.start} {m.size}" for m in self.members)
        return digest_of_files(archives, "as stored", *places)


def is_archive(folder: Path) -> bool:
    """Return whether a folder has CLIP_benchmark's layout."""
    return any(folder.glob(f"*/{COUNT}"))


def archive_task(name: str, locate: Callable[[Iterable[str]], Path], source: str) -> Task:
    """Return the task of a data set in CLIP_benchmark's layout.

    The images of a split are in ``{split}/{i}.tar``, whose number is in ``{split}/nshards.txt``.
    In an archive, ``KEY.png`` (or ``jpg``, ``jpeg``, ``webp``) is an image, ``KEY.cls`` the index
    of its class, ``KEY.txt`` its captions, one a line. Names of classes are in ``classnames.txt``,
    prompts in ``zeroshot_classification_templates.txt``. For missing splits see `split_loader`.

    Args:
        name: the name of the task.
        locate: returns the folder that holds the given files of the data set; it may fetch them.
        source: where the images come from.

    Raises:
        TaskError: if the layout is wrong, or the data set is of a kind that can't be scored.
    """
    folder = locate(TEXTS)
    classes = _read_classes(folder / CLASSES)
    templates = (
        read_prompts(folder / TEMPLATES, "{c}") if (folder / TEMPLATES).is_file() else PROMPTS
    )
    if (folder / KIND).is_file() and "multilabel" in read_lines(folder / KIND):
        raise TaskError(f"{source} has several labels an image, which weightops can't score")
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        log.warning("%s gives one name to several classes: %s", source, first_few(twice))
    folders = _split_folders(folder, source)
    counts = {split: _read_count(folder / name / COUNT) for split, name in folders.items()}

    def read(split: str) -> Images:
        names = [f"{folders[split]}/{i}.tar" for i in range(counts[split])]
        present = locate(names)
        missing = [name for name in names if not (present / name).is_file()]
        if missing:
            share = f"{len(missing)} of {len(names)} archives"
            raise TaskError(f"{source} lacks {missing[0]} ({share})")
        more = {path.name for path in (present / folders[split]).glob("*.tar")}
        more -= {Path(name).name for name in names}
        if more:
            raise TaskError(
                f"{present / folders[split]} has {first_few(sorted(more))}, and {COUNT} says that "
                f"there are {len(names)} archives"
            )
        return read_archives([present / name for name in names], len(classes))

    load = split_loader(compared(read, source), counts, source)
    license = "see the data set's page"
    return Task(name, classes, templates, load, LazySizes(load), source, license, upright=False)


def _split_folders(folder: Path, source: str) -> dict[str, str]:
    """Return split -> the name of its folder.

    Raises:
        TaskError: if a folder of archives is no split that is understood, or a second for a split.
    """
    names = sorted(path.parent.name for path in folder.glob(f"*/{COUNT}"))
    unclear = [name for name in names if split_of(name) is None]
    if unclear:
        raise TaskError(
            f"{source} has archives in {first_few(unclear)}, which is no split that is understood",
            hint=HINT,
        )
    return one_name_each(names, source)


def read_archives(archives: Sequence[Path], classes: int) -> ArchiveImages:
    """Return the images of archives, in their order.

    Args:
        archives: tar files in one folder.
        classes: the number of classes; every label is smaller.

    Raises:
        TaskError: naming the damaged archive, or the file in it.
    """
    members, labels, captions = [], [], []
    for archive in tracked(archives, "archives"):
        for key, files in _samples(archive):
            members.append(_image_member(key, files, archive))
            if "cls" in files:
                labels.append(_read_label(files["cls"], classes))
            if "txt" in files:
                captions.append(_read_captions(files["txt"]))
    for kind, values in (("classes", labels), ("captions", captions)):
        if values and len(values) < len(members):
            share = f"{len(members) - len(values)} of {len(members)} pictures"
            raise TaskError(f"{share} in {archives[0].parent} have no {kind}")
    truth = np.array(labels, dtype=np.int64) if labels else np.zeros(len(members), dtype=np.int64)
    return ArchiveImages(members, truth, captions or None)


def _samples(archive: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield each key with its files by suffix; the files of a key follow each other.

    The key of a file is its path up to the first dot of its name.
    """
    files: dict[str, Member] = {}
    key = None
    try:
        with tarfile.open(archive, "r:", tarinfo=_Header) as tar:
            for info in tar:
                if info.size < 0 or tar.offset <= info.offset:
                    raise ValueError(f"{info.name[:80]} has a size that can't be")
                name = info.name.rpartition("/")[2]
                if not info.isreg() or info.issparse() or _is_left_behind(info.name):
                    continue
                stem, _, suffix = name.partition(".")
                next_key = info.name.removesuffix(name) + stem
                if next_key != key and files:
                    yield str(key), files
                    files = {}
                key = next_key
                files[suffix.lower()] = Member(archive, info.name, info.offset_data, info.size)
            if tar.offset >= archive.stat().st_size:  # an empty block ends a sound archive
                raise TaskError(
                    f"{archive} is cut short", hint="the download or copy is incomplete: repeat it"
                )
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise TaskError(f"{archive} is not an archive that can be read: {error}") from error
    if files:
        yield str(key), files


class _Header(tarfile.TarInfo):
    """A header whose names and notes aren't larger than any sound ones."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (not header.isfile() and header.size > _LARGEST_NOTE):
            raise ValueError(f"it has a header that claims {header.size:,} bytes")
        return header


def _is_left_behind(path: str) -> bool:
    return any(is_left_behind(part) for part in path.split("/") if part != ".")


def _image_member(key: str, files: Mapping[str, Member], archive: Path) -> Member:
    """Return the image of a key that has an image, and a class or captions."""
    image = next((files[suffix] for suffix in _IMAGE_SUFFIXES if suffix in files), None)
    if image is None:
        raise TaskError(f"{key} in {archive} has no picture")
    if not ("cls" in files or "txt" in files):
        raise TaskError(f"{key} in {archive} has no class (.cls) and no captions (.txt)")
    return image


def _read_label(member: Member, classes: int) -> int:
    text = member.read().strip()
    if not re.fullmatch(rb"\d{1,9}", text) or int(text) >= classes:
        raise TaskError(
            f"{member.name} in {member.archive} is {text[:20]!r}, "
            f"not the number of one of {classes} classes"
        )
    return int(text)


def _read_captions(member: Member) -> tuple[str, ...]:
    lines = member.read().decode(errors="replace").splitlines()
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise TaskError(f"{member.name} in {member.archive} is empty")
    return captions


def _read_classes(path: Path) -> tuple[str, ...]:
    """Return the names of classes, one a line, by index; none if there is no such file."""
    if not path.is_file():
        return ()
    read_lines(path)  # raises if the file can't be read or is empty
    names = path.read_text(encoding="utf-8").rstrip().splitlines()
    blank = [i for i, name in enumerate(names) if not name.strip()]
    if blank:
        raise TaskError(f"{path} has no name for class {blank[0]}")
    return tuple(name.strip() for name in names)


def _read_count(path: Path) -> int:
    text = " ".join(read_lines(path))
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise TaskError(f"{path} should hold the number of archives, not {text[:20]!r}")
    return int(text)
