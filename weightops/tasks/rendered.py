"""Built-in tasks whose images are drawn from a seed, without network or files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.tasks import drawing
from weightops.tasks.fonts import STYLES, Face, faces
from weightops.tasks.masks import SHAPES, TEXTURES, shape_mask
from weightops.tasks.seeds import seed
from weightops.tasks.task import Task

Draw = Callable[[np.random.Generator, str, str], drawing.Picture]
"""A function that draws an image, given a generator, a class name and a split (for its fonts)."""

COUNTS = ("one", "two", "three", "four", "five")

SIZES = {"train": 2000, "validation": 500, "test": 1000}


@dataclass(frozen=True)
class RenderedImages(Sequence[Image.Image]):
    """Images of one split. Image ``i`` is drawn from the seed (task, split, i) when accessed."""

    task: str
    split: str
    classes: tuple[str, ...]
    draw: Draw
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        rng = np.random.default_rng(seed(self.task, self.split, index))
        return Image.fromarray(self.draw(rng, self.classes[self.labels[index]], self.split))


def rendered(name: str, classes: Sequence[str], templates: Sequence[str], draw: Draw) -> Task:
    """Return a task whose images are drawn.

    Args:
        name: the name of the task, part of the seed of every image.
        classes: names of the classes; each has equally many images in a split.
        templates: prompts with ``{}`` for the class.
        draw: draws an image.
    """
    classes = tuple(classes)

    def load(split: str) -> RenderedImages:
        labels = np.arange(SIZES[split], dtype=np.int64) % len(classes)
        return RenderedImages(name, split, classes, draw, labels)

    return Task(
        name,
        classes,
        tuple(templates),
        load,
        sizes=SIZES,
        source="rendered by weightops",
        license="Apache-2.0",
    )


def any_face(rng: np.random.Generator, split: str, style: str | None = None) -> Face:
    """Return a random font of the split, of one style or any."""
    choices = faces(style or STYLES[rng.integers(len(STYLES))], split)
    return choices[rng.integers(len(choices))]


def _shape(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    ink, ground = drawing.contrasting_colors(rng)
    return drawing.picture(rng, shape_mask(rng, label), ink, ground)


def _color(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    ink, ground = drawing.contrasting_colors(rng, label)
    return drawing.picture(rng, shape_mask(rng, str(rng.choice(list(SHAPES)))), ink, ground)


def _count(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    ink, ground = drawing.contrasting_colors(rng)
    mask = shape_mask(rng, str(rng.choice(list(SHAPES))), 1 + COUNTS.index(label))
    return drawing.picture(rng, mask, ink, ground)


def _texture(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    ink, ground = drawing.contrasting_colors(rng)
    return drawing.texture(rng, label, ink, ground)


def _letter(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    return drawing.glyphs(rng, label if rng.random() < 0.5 else label.upper(), any_face(rng, split))


def _font(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    letter = ascii_lowercase[rng.integers(26)]
    letter = letter if rng.random() < 0.5 else letter.upper()
    return drawing.glyphs(rng, letter, any_face(rng, split, label))


def _word(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    return drawing.glyphs(rng, label, any_face(rng, split))


TASKS = (
    rendered(
        "shapes",
        list(SHAPES),
        ["a {}.", "a photo of a {}.", "a picture of a {}.", "a drawing of a {}."],
        _shape,
    ),
    rendered(
        "colors",
        list(drawing.COLORS),
        ["a {} shape.", "a photo of a {} shape.", "something {}.", "a picture of something {}."],
        _color,
    ),
    rendered(
        "textures",
        list(TEXTURES),
        ["{}.", "a photo of {}.", "a picture of {}.", "a pattern of {}."],
        _texture,
    ),
    rendered(
        "counting",
        COUNTS,
        [
            "{} shapes.",
            "a photo of {} shapes.",
            "a picture of {} shapes.",
            "a drawing of {} shapes.",
        ],
        _count,
    ),
    rendered(
        "letters",
        ascii_lowercase,
        [
            "the letter {}.",
            "a photo of the letter {}.",
            "a picture of the letter {}.",
            'the letter "{}".',
        ],
        _letter,
    ),
    rendered(
        "fonts",
        STYLES,
        [
            "a letter in a {} font.",
            "a photo of a letter in a {} font.",
            "a {} letter.",
            "text in a {} font.",
        ],
        _font,
    ),
    rendered(
        "words",
        list(SHAPES),
        ['the word "{}".', 'a photo of the word "{}".', "the word {}.", "text that says {}."],
        _word,
    ),
)
