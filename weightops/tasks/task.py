"""What a task is: labelled images in splits, the classes' names, and prompts to say them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from weightops.errors import TaskError

SPLITS = ("train", "validation", "test")
PROMPTS = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a {}.")
"""Templates for classes that come without any."""

Captions = Sequence[tuple[str, ...]]
"""The texts that are true of each image."""


class Images(Protocol):
    """Labelled images: a sequence of pictures and an array of class indices, equally long. Some also have `captions_of`."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class indices, shape ``(n,)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image: ...


@dataclass(frozen=True)
class Altered:
    """Images with other pictures and the same labels; what is done to a picture is up to ``__getitem__``."""

    images: Images

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Those of the images."""
        return self.images.labels

    @property
    def captions(self) -> Captions | None:
        """Those of the images."""
        return captions_of(self.images)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class SomeImages:
    """Some of a split's pictures, with labels of their own."""

    images: Images
    indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    @property
    def captions(self) -> Captions | None:
        """Those of the images."""
        every = captions_of(self.images)
        return None if every is None else [every[int(i)] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Image.Image:
        return self.images[int(self.indices[index])]


def captions_of(images: Images) -> Captions | None:
    """The texts that are true of each image, where these have any."""
    captions: Captions | None = getattr(images, "captions", None)
    return captions


def read_picture(file: Path | IO[bytes], name: str) -> Image.Image:
    """A picture in RGB.

    Raises:
        TaskError: naming it, if it isn't one.
    """
    try:
        with Image.open(file) as image:
            wide = image.mode.startswith("I")  # 16 bits a pixel, which `convert` would clip to 8
            picture: Image.Image = (
                image.point(lambda value: value / 256, "L") if wide else image
            ).convert("RGB")
            return picture
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        raise TaskError(f"{name} is not an image that can be read: {error}") from error


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a text that aren't blank.

    Raises:
        TaskError: if it can't be read, or there are none.
    """
    try:
        lines = tuple(
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} can't be read: {error}") from error
    if not lines:
        raise TaskError(f"{path} is empty")
    return lines


def read_prompts(path: Path, blank: str = "{}") -> tuple[str, ...]:
    """Templates, one a line, with ``{}`` for the class.

    Args:
        path: the text.
        blank: what stands for the class in it.

    Raises:
        TaskError: as from `read_lines`, and if a line has no place for the class.
    """
    lines = read_lines(path)
    odd = [line for line in lines if blank not in line]
    if odd:
        raise TaskError(
            f"{path} needs one prompt a line, each with {blank} for the class; not {odd[0]!r}"
        )
    return tuple(line.replace(blank, "{}") for line in lines)


class Sizes(Mapping[str, int]):
    """Sizes of splits that are known only when the pictures are."""

    def __init__(self, load: Callable[[str], Images]) -> None:
        self._load = load

    def __getitem__(self, split: str) -> int:
        if split not in SPLITS:
            raise KeyError(split)
        return len(self._load(split))

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)


@dataclass(frozen=True, eq=False)
class Task:
    """Zero-shot classification: images in splits, class names, and prompt templates with ``{}`` for the class.

    Attributes:
        name: what it is called on the command line and in results.
        classes: names of the classes; an image's label is an index into them.
        templates: prompts; ``{}`` stands for the class.
        load: gives the images of a split ("train", "validation" or "test").
        sizes: number of images in each split.
        source: where the images come from.
        license: the licence of the images.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    load: Callable[[str], Images]
    sizes: Mapping[str, int]
    source: str
    license: str

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """The texts that stand for each class."""
        return tuple(
            tuple(template.replace("{}", name) for template in self.templates)
            for name in self.classes
        )
