"""Tasks whose pictures are drawn on the fly from a seed: no network, no files, nothing to download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.tasks import drawing
from weightops.tasks.fonts import STYLES, Face, faces
from weightops.tasks.seeds import seed
from weightops.tasks.task import Task

Draw = Callable[[np.random.Generator, str, str], drawing.Picture]
"""Draws one picture: generator, class name, split (which says which fonts may be used)."""


COUNTS = ("one", "two", "three", "four", "five")


SIZES = {"train": 2000, "validation": 500, "test": 1000}


@dataclass(frozen=True)
class RenderedImages(Sequence[Image.Image]):
    """Pictures of one split; picture ``i`` is drawn from the seed (task, split, i) when it is asked for."""

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
    """A task drawn by ``draw``; classes are balanced within each split."""
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
    """A font of the split, of one style or any."""
    choices = faces(style or STYLES[rng.integers(len(STYLES))], split)
    return choices[rng.integers(len(choices))]


def _shape(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    ink, ground = drawing.contrasting_colors(rng)
    return drawing.picture(rng, drawing.shape_mask(rng, label), ink, ground)


def _color(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    ink, ground = drawing.contrasting_colors(rng, label)
    return drawing.picture(
        rng, drawing.shape_mask(rng, str(rng.choice(list(drawing.SHAPES)))), ink, ground
    )


def _count(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    ink, ground = drawing.contrasting_colors(rng)
    mask = drawing.shape_mask(rng, str(rng.choice(list(drawing.SHAPES))), 1 + COUNTS.index(label))
    return drawing.picture(rng, mask, ink, ground)


def _texture(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    ink, ground = drawing.contrasting_colors(rng)
    return drawing.texture(rng, label, ink, ground)


def _letter(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    return drawing.glyphs(rng, label if rng.random() < 0.5 else label.upper(), any_face(rng, split))


def _font(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    letter = ascii_lowercase[rng.integers(26)]
    return drawing.glyphs(
        rng, letter if rng.random() < 0.5 else letter.upper(), any_face(rng, split, label)
    )


def _word(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    return drawing.glyphs(rng, label, any_face(rng, split))


TASKS = (
    rendered(
        "shapes",
        list(drawing.SHAPES),
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
        list(drawing.TEXTURES),
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
        list(drawing.SHAPES),
        ['the word "{}".', 'a photo of the word "{}".', "the word {}.", "text that says {}."],
        _word,
    ),
)
