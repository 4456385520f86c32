"""Tasks on stripes, which the embedded model hasn't seen: they leave room for what edits gain."""

from __future__ import annotations

import math

import numpy as np

from weightops.tasks import drawing, masks
from weightops.tasks.rendered import COUNTS, any_face, rendered
from weightops.tasks.table import find_task


def _stripes(rng: np.random.Generator, ground: str, step: int) -> masks.Floats:
    """Return diagonal stripes of a colour and of a lighter or darker one."""
    light = drawing.color(rng, ground)
    dark = light + (step if light.mean() < 128 else -step)
    paper: masks.Floats = light + masks.TEXTURES["diagonal stripes"](rng)[..., None] * (
        dark - light
    )
    return paper


def _letter(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    letter = label if rng.random() < 0.5 else label.upper()
    mask = masks.text_mask(rng, letter, any_face(rng, split))
    ink, ground = drawing.contrasting_colors(rng)
    paper = _stripes(rng, ground, 90)
    return drawing.expose(rng, drawing.compose(mask, drawing.color(rng, ink), paper))


def _count(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    """Draw things of different shapes, sizes and colours, which may touch each other."""
    ground = drawing.contrasting_colors(rng)[1]
    picture = _stripes(rng, ground, 70)
    for x, y, radius in _places(rng, 1 + COUNTS.index(label)):
        mask = masks.placed_shape(rng, str(rng.choice(list(masks.SHAPES))), [(x, y, radius)])
        picture = drawing.compose(mask, drawing.color(rng, _ink_on(rng, ground)), picture)
    return drawing.expose(rng, picture)


def _places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Return centres and radii, as shares of the side, of discs that touch at most."""
    while True:
        radii, centres = rng.uniform(0.08, 0.2, count), rng.uniform(0.12, 0.88, (count, 2))
        pairs = np.triu_indices(count, 1)
        gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1)[pairs]
        if (gaps >= (radii[:, None] + radii[None])[pairs]).all():
            return [(x, y, r) for (x, y), r in zip(centres, radii, strict=True)]


def _ink_on(rng: np.random.Generator, ground: str) -> str:
    """Return the name of a colour that contrasts with another."""
    colors = drawing.COLORS
    return str(rng.choice([n for n in colors if math.dist(colors[n], colors[ground]) > 150]))


_PLAIN, _COUNTING = find_task("letters"), find_task("counting")
STRIPED_LETTERS = rendered("striped letters", _PLAIN.classes, _PLAIN.templates, _letter)
STRIPED_COUNTING = rendered("striped counting", COUNTS, _COUNTING.templates, _count)
