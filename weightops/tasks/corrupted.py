"""TODO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from weightops.errors import OptionError
from weightops.support.registry import Registry
from weightops.tasks.seeds import seed
from weightops.tasks.task import Altered, Task

SEVERITIES = (1, 2, 3, 4, 5)


Corruption = Callable[[Image.Image, int, np.random.Generator], Image.Image]
"""RGB image, severity from 1 to 5, randomness -> RGB image of the same size."""


def noise(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise with a standard deviation of 8 to 40 % of the range."""
    pixels = np.asarray(image, dtype=np.float32)
    return _image(pixels + rng.normal(0, 0.08 * 255 * severity, pixels.shape))


def blur(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur with a radius of 1.5 to 7.5 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(0.015 * severity * min(image.size)))


def contrast(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Distances from the mean grey, times 0.7 to 0.05."""
    pixels = np.asarray(image, dtype=np.float32)
    return _image(
        pixels.mean() + (0.7, 0.5, 0.3, 0.15, 0.05)[severity - 1] * (pixels - pixels.mean())
    )


def rotation(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """By 15 to 75 degrees to either side; the corners are filled with the median colour of the border."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = tuple(int(value) for value in np.median(border, axis=0))
    angle = 15 * severity * (1 if rng.random() < 0.5 else -1)
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=colour)


def inversion(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """The negative of a band that covers 20 to 100 % of the width, from the left or the right."""
    pixels = np.asarray(image).copy()
    width = round(pixels.shape[1] * severity / 5)
    band = slice(0, width) if rng.random() < 0.5 else slice(pixels.shape[1] - width, None)
    pixels[:, band] = 255 - pixels[:, band]
    return Image.fromarray(pixels)


def _image(pixels: npt.NDArray[Any]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


CORRUPTIONS: Registry[Corruption] = Registry(
    "corruption",
    "corruptions",
    {
        "noise": noise,
        "blur": blur,
        "contrast": contrast,
        "rotation": rotation,
        "inversion": inversion,
    },
)


@dataclass(frozen=True)
class CorruptedImages(Altered):
    """Images as a corruption leaves them, the same every time."""

    name: str
    corruption: Corruption
    severity: int

    def __getitem__(self, index: int) -> Image.Image:
        rng = np.random.default_rng(seed(self.name, index))
        return self.corruption(self.images[index].convert("RGB"), self.severity, rng)


@cache  # one task, one set of prepared images
def corrupted(task: Task, corruption: str, severity: int) -> Task:
    """The task with all its images corrupted; a task like any other.

    Raises:
        UnknownNameError: if there is no such corruption.
        OptionError: if the severity isn't one of 1 to 5.

    >>> from weightops import TASKS
    >>> corrupted(TASKS["shapes"], "blur", 3).name
    'shapes+blur-3'
    """
    function = CORRUPTIONS[corruption]
    if severity not in SEVERITIES:
        raise OptionError(f"severities of {corruption} are 1 to 5, not {severity}")
    name = f"{task.name}+{corruption}-{severity}"
    return replace(
        task,
        name=name,
        load=lambda split: CorruptedImages(task.load(split), f"{name}/{split}", function, severity),
    )
