"""Folders of drawn pictures, by class, and a recipe to learn them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from weightops.tasks import drawing
from weightops.tasks.masks import shape_mask

SHORT = {"steps": 8, "batch_size": 8, "lr": 2e-3, "warmup": 1}
"""A recipe of fine-tuning that learns such pictures in a second."""


def draw(folder: Path, names: dict[str, str], count: int, seed: int) -> None:
    """Write folders by class, each with pictures of the shape that the class is mapped to."""
    rng = np.random.default_rng(seed)
    for name, shape in names.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            mask = shape_mask(rng, shape)
            picture = drawing.picture(rng, mask, *drawing.contrasting_colors(rng))
            Image.fromarray(picture).save(folder / name / f"{i:03}.png")
