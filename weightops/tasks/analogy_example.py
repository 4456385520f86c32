"""The tasks of the built-in analogy: two halves of the alphabet in two styles."""

from __future__ import annotations

import numpy as np

from weightops.tasks import drawing, masks
from weightops.tasks.derived import with_classes
from weightops.tasks.rendered import any_face, rendered
from weightops.tasks.table import find_task


def _striped(rng: np.random.Generator, label: str, split: str) -> drawing.Picture:
    """Draw a letter on stripes."""
    letter = label if rng.random() < 0.5 else label.upper()
    mask = masks.text_mask(rng, letter, any_face(rng, split))
    ink, ground = drawing.contrasting_colors(rng)
    light = drawing.color(rng, ground)
    dark = light + (90 if light.mean() < 128 else -90)
    stripes = masks.TEXTURES["diagonal stripes"](rng)[..., None]
    paper = light + stripes * (dark - light)
    return drawing.expose(rng, drawing.compose(mask, drawing.color(rng, ink), paper))


PLAIN = find_task("letters")
STRIPED = rendered("striped letters", PLAIN.classes, PLAIN.templates, _striped)
ANALOGY = tuple(
    with_classes(style, half, f"{style.name} {half[0]}-{half[-1]}")
    for half in (PLAIN.classes[:13], PLAIN.classes[13:])
    for style in (PLAIN, STRIPED)
)
"""Plain letters a-m are to striped letters a-m as plain letters n-z are to striped letters n-z."""
