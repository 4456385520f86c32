"""A task: labelled images in splits, the names of the classes, and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.support.registry import unknown

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)

PROMPTS = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a {}.")
"""The default templates, for classes that come without any."""

Captions = Sequence[tuple[str, ...]]
"""The captions of each image."""


class Images(Protocol):
    """The labelled images of a split: a sequence of RGB or grey images with an array of labels.

    Images with captions also have an attribute ``captions``: see `captions_of`. Images in files
    also have ``encoded`` and ``encoded_size``, see `encoded_of`, and ``digest``, see `digest_of`.
    """

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class indices, shape ``(n,)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image: ...


@dataclass(frozen=True)
class AlteredImages:
    """Images that are changed by the ``__getitem__`` of a subclass; labels and captions stay."""

    images: Images

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class indices, shape ``(n,)``."""
        return self.images.labels

    @property
    def captions(self) -> Captions | None:
        """The captions of the unchanged images."""
        return captions_of(self.images)

    @property
    def unreadable(self) -> int:
        """The number of pictures that were left out, as they can't be read."""
        return unreadable_in(self.images)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageSubset:
    """Some images of a split, with labels of their own."""

    images: Images
    indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    @property
    def captions(self) -> Captions | None:
        """The captions of the chosen images."""
        captions = captions_of(self.images)
        return None if captions is None else [captions[int(i)] for i in self.indices]

    @property
    def unreadable(self) -> int:
        """The number of pictures that were left out of the split, as they can't be read."""
        return unreadable_in(self.images)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Image.Image:
        return self.images[int(self.indices[index])]

    def encoded(self, index: int, most: int = -1) -> bytes | None:
        """Return the content of the file of an image, or None if it is in no file."""
        return encoded_of(self.images, int(self.indices[index]), most)

    def encoded_size(self, index: int) -> int | None:
        """Return the size of the file of an image, or None if it is in no file."""
        return encoded_size_of(self.images, int(self.indices[index]))

    def digest(self) -> str | None:
        """Return what tells the images from others, or None if they are in no files."""
        whole = digest_of(self.images)
        indices = np.asarray(self.indices, dtype=np.int64).tobytes()
        return None if whole is None else sha256(whole.encode() + indices).hexdigest()


def captions_of(images: Images) -> Captions | None:
    """Return the captions of each image, or None if the images have none."""
    captions: Captions | None = getattr(images, "captions", None)
    return captions


def unreadable_in(images: Images) -> int:
    """Return the number of pictures that were left out of a split, as they can't be read."""
    count: int = getattr(images, "unreadable", 0)
    return count


def encoded_of(images: Images, index: int, most: int = -1) -> bytes | None:
    """Return the content of the file of an image, or None if the image is in no file.

    Args:
        images: the images of a split.
        index: the place of the image.
        most: the largest number of bytes to read; -1 for all.
    """
    encoded: Callable[[int, int], bytes | None] | None = getattr(images, "encoded", None)
    return None if encoded is None else encoded(index, most)


def encoded_size_of(images: Images, index: int) -> int | None:
    """Return the size of the file of an image, or None if the image is in no file."""
    size: Callable[[int], int | None] | None = getattr(images, "encoded_size", None)
    return None if size is None else size(index)


def digest_of(images: Images) -> str | None:
    """Return what tells images from all others; None if they aren't in files.

    Files are told by their paths, sizes and times, so that they need not be read.
    """
    digest: Callable[[], str | None] | None = getattr(images, "digest", None)
    return None if digest is None else digest()


def digest_of_files(paths: Iterable[Path], *more: str) -> str:
    """Return a digest of files by their paths, sizes and times, and of further texts."""
    digest = sha256()
    for path in paths:
        place = path.resolve()
        facts = place.stat()
        text = f"{place}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ctime_ns}\0"
        digest.update(text.encode(errors="surrogateescape"))
    digest.update("\0".join(more).encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_lines(path: Path) -> tuple[str, ...]:
    """Return the lines of a text file that aren't blank.

    Raises:
        TaskError: if the file can't be read, or all its lines are blank.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} can't be read: {error}") from error
    lines = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not lines:
        raise TaskError(f"{path} is empty")
    return lines


def read_prompts(path: Path, placeholder: str = "{}") -> tuple[str, ...]:
    """Read templates, one a line, and return them with ``{}`` for the class.

    Args:
        path: the text file.
        placeholder: what stands for the class in the file.

    Raises:
        TaskError: if the file can't be read or is empty, or a line lacks the placeholder.
    """
    lines = read_lines(path)
    without = [line for line in lines if placeholder not in line]
    if without:
        raise TaskError(
            f"{path} needs one prompt a line, each with {placeholder} for the class; "
            f"not {without[0]!r}"
        )
    return tuple(line.replace(placeholder, "{}") for line in lines)


class LazySizes(Mapping[str, int]):
    """Sizes of splits, which are known once the images are loaded."""

    def __init__(self, load: Callable[[str], Images]) -> None:
        self._load = load

    def __getitem__(self, split: str) -> int:
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return len(self._load(split))

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)


@dataclass(frozen=True, eq=False)
class Task:
    """Image classification: images in splits, names of classes, and prompt templates.

    Attributes:
        name: what the task is called on the command line and in results.
        classes: names of the classes; an image's label is an index into them.
        templates: prompts with ``{}`` for the name of the class.
        load: returns the `Images` of a split: "train", "validation" or "test".
        sizes: number of images in each split.
        source: where the images come from.
        license: the licence of the images.
        raw_classes: the names of the classes as the data have them, such as names of folders;
            by default ``classes``. The outputs of a classifier are matched with either.
        upright: whether photographs are turned as their EXIF orientation says, which CLIP_benchmark
            doesn't do.
        class_order: the order of the outputs of a classifier with a head of its own, see
            `in_order`; None for the order that the classifier records.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    load: Callable[[str], Images]
    sizes: Mapping[str, int]
    source: str
    license: str
    raw_classes: tuple[str, ...] = ()
    upright: bool = True
    class_order: str | None = None

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {len(self.classes)} classes, {self.source})"

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """The prompts of each class: all templates with the name of the class."""
        return tuple(
            tuple(template.replace("{}", name) for template in self.templates)
            for name in self.classes
        )

    def reading(self, *splits: str) -> dict[str, Any]:
        """Return how the pictures of splits are read, for a record of results."""
        return {
            "source": self.source,
            "orientation": "upright" if self.upright else "as stored",
            "class_order": self.class_order,
            "unreadable": sum(unreadable_in(self.load(split)) for split in splits),
        }
