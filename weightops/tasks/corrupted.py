"""Corruptions of images, by kind and severity, and tasks with all their images corrupted."""

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
from weightops.tasks.task import AlteredImages, Task

SEVERITIES = (1, 2, 3, 4, 5)

Corruption = Callable[[Image.Image, int, np.random.Generator], Image.Image]
"""A function of an RGB image, a severity from 1 to 5 and a generator: returns an RGB image."""

_CONTRASTS = (0.7, 0.5, 0.3, 0.15, 0.05)


def noise(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Add Gaussian noise with a standard deviation of 8 to 40 % of the range."""
    pixels = np.asarray(image, dtype=np.float32)
    return _as_image(pixels + rng.normal(0, 0.08 * 255 * severity, pixels.shape))


def blur(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Apply a Gaussian blur with a radius of 1.5 to 7.5 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(0.015 * severity * min(image.size)))


def contrast(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Multiply the distances from the mean grey by 0.7 to 0.05."""
    pixels = np.asarray(image, dtype=np.float32)
    mean = pixels.mean()
    return _as_image(mean + _CONTRASTS[severity - 1] * (pixels - mean))


def rotation(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Rotate by 15 to 75 degrees to either side.

    The corners are filled with the median colour of the border.
    """
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = tuple(int(value) for value in np.median(border, axis=0))
    angle = 15 * severity * (1 if rng.random() < 0.5 else -1)
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=colour)


def inversion(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Invert a band that covers 20 to 100 % of the width, from the left or the right."""
    pixels = np.asarray(image).copy()
    width = round(pixels.shape[1] * severity / 5)
    band = slice(0, width) if rng.random() < 0.5 else slice(pixels.shape[1] - width, None)
    pixels[:, band] = 255 - pixels[:, band]
    return Image.fromarray(pixels)


def _as_image(pixels: npt.NDArray[Any]) -> Image.Image:
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
class CorruptedImages(AlteredImages):
    """Images after a corruption, the same every time.

    Attributes:
        images: the images before the corruption.
        name: part of the seed.
        corruption: the corruption.
        severity: its severity, from 1 to 5.
    """

    name: str
    corruption: Corruption
    severity: int

    def __getitem__(self, index: int) -> Image.Image:
        rng = np.random.default_rng(seed(self.name, index))
        return self.corruption(self.images[index].convert("RGB"), self.severity, rng)


@cache  # so that a model prepares the images of a corrupted task once
def corrupted(task: Task, corruption: str, severity: int) -> Task:
    """Return a task with all its images corrupted.

    Args:
        task: the task.
        corruption: a name in `CORRUPTIONS`.
        severity: from 1 to 5.

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

    def load(split: str) -> CorruptedImages:
        return CorruptedImages(task.load(split), f"{name}/{split}", function, severity)

    return replace(task, name=name, load=load)
