"""Draw small labelled pictures in named colours from a random generator.

A picture is a ``uint8`` array of shape ``(SIZE, SIZE, 3)``. It depends on the generator only, so
that a seed identifies a picture.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from weightops.tasks.fonts import Face
from weightops.tasks.masks import SIZE, TEXTURES, Floats, text_mask

Picture = npt.NDArray[np.uint8]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (245, 140, 25),
    "yellow": (245, 225, 50),
    "green": (40, 160, 60),
    "cyan": (50, 210, 220),
    "blue": (35, 65, 210),
    "purple": (125, 40, 165),
    "pink": (245, 135, 190),
    "brown": (120, 75, 35),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "white": (245, 245, 245),
}
"""RGB values of the named colours."""

_FAINT_PATTERNS = ["horizontal stripes", "vertical stripes", "diagonal stripes", "checkerboard"]


def color(rng: np.random.Generator, name: str) -> Floats:
    """Return an RGB value (three floats, 0 to 255) near the named colour."""
    return np.clip(np.asarray(COLORS[name]) + rng.normal(0, 9, 3), 0, 255).astype(np.float32)


def contrasting_colors(rng: np.random.Generator, first: str | None = None) -> tuple[str, str]:
    """Return the names of two colours that are easy to distinguish; ``first`` may fix the first."""
    names = list(COLORS)
    while True:
        one, other = first or str(rng.choice(names)), str(rng.choice(names))
        if math.dist(COLORS[one], COLORS[other]) > 150:
            return one, other


def backdrop(rng: np.random.Generator, name: str) -> Floats:
    """Return a background of one named colour, shape ``(SIZE, SIZE, 3)``.

    The background is plain, shaded, speckled or faintly patterned.
    """
    base = color(rng, name)
    kind = rng.random()
    if kind < 0.4:
        return np.tile(base, (SIZE, SIZE, 1))
    other = np.clip(base + rng.uniform(-45, 45), 0, 255)
    if kind < 0.6:
        pattern = TEXTURES["gradient"](rng)
    elif kind < 0.8:
        pattern = rng.random((SIZE, SIZE), dtype=np.float32)
    else:
        pattern = TEXTURES[str(rng.choice(_FAINT_PATTERNS))](rng)
    values: Floats = base + pattern[..., None] * (other - base).astype(np.float32)
    return values


def compose(mask: Floats, ink: Floats, ground: Floats) -> Floats:
    """Return ``ink`` (a colour or a picture) over ``ground`` where ``mask`` is 1."""
    return ground + mask[..., None] * (ink - ground)


def expose(rng: np.random.Generator, image: Floats) -> Picture:
    """Return an image as a mediocre camera would take it, with some noise and another contrast."""
    contrast = np.float32(rng.uniform(0.8, 1.05))
    image = (image - 128) * contrast + np.float32(128 + rng.uniform(-12, 12))
    if rng.random() < 0.6:
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        image = image + noise * np.float32(rng.uniform(0, 18))
    return np.clip(image, 0, 255).astype(np.uint8)


def picture(rng: np.random.Generator, mask: Floats, ink: str, ground: str) -> Picture:
    """Draw a mask in one named colour on a backdrop of another."""
    return expose(rng, compose(mask, color(rng, ink), backdrop(rng, ground)))


def texture(rng: np.random.Generator, name: str, ink: str, ground: str) -> Picture:
    """Draw a texture in two named colours."""
    return expose(rng, compose(TEXTURES[name](rng), color(rng, ink), color(rng, ground)))


def glyphs(
    rng: np.random.Generator,
    text: str,
    face: Face,
    *,
    colors: tuple[str, str] | None = None,
    warp: float = 0.0,
) -> Picture:
    """Draw a letter, digit or word.

    Args:
        rng: the source of randomness.
        text: the letter, digit or word.
        face: the font.
        colors: names of the colours of text and background. By default they contrast, and are
            often white on black or black on white.
        warp: strength of an elastic distortion, 0 for none.
    """
    mask = text_mask(rng, text, face, scale=0.75 if len(text) == 1 else 0.95, warp=warp)
    if colors is None and rng.random() < 0.3:
        colors = ("white", "black") if rng.random() < 0.6 else ("black", "white")
    return picture(rng, mask, *(colors or contrasting_colors(rng)))
