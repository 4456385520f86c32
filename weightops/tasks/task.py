"""What a task is: labelled images in splits, the classes' names, and prompts to say them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

SPLITS = ("train", "validation", "test")


class Images(Protocol):
    """Labelled images: a sequence of pictures and an array of class indices, equally long."""

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

    def __len__(self) -> int:
        return len(self.images)


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
        return tuple(tuple(template.replace("{}", name) for template in self.templates) for name in self.classes)
