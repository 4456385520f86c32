"""Write words over pictures, or beside them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from weightops.tasks.drawing import COLORS, color
from weightops.tasks.masks import Floats, text_mask
from weightops.tasks.rendered import any_face

_MIN_CONTRAST = 110  # distance in RGB at which a word is readable

_SIDE, _PICTURE, _BAND = 96, 62, 30
"""Pixels of the whole's side, of the picture in it, and of the height of the word beside it."""


def write_word(image: Image.Image, word: str, rng: np.random.Generator, split: str) -> Image.Image:
    """Return an image with a word over it, in a font of the split."""
    mask = text_mask(rng, word, any_face(rng, split), scale=rng.uniform(0.65, 0.95))
    rows = np.flatnonzero(mask.max(1) > 0)
    if len(rows):
        mask = np.roll(mask, int(rng.integers(-rows[0], len(mask) - rows[-1])), axis=0)
    stretched = Image.fromarray((255 * mask).astype(np.uint8)).resize(
        image.size, Image.Resampling.BILINEAR
    )
    names = list(COLORS)
    ink = color(rng, names[rng.integers(len(names))])
    ground = np.asarray(image.convert("RGB"), dtype=np.float32)
    cover = np.asarray(stretched, dtype=np.float32)[..., None] / 255
    ink = _readable(ink, ground[cover[..., 0] > 0.5])
    return Image.fromarray(np.clip(ground + cover * (ink - ground), 0, 255).astype(np.uint8))


def _readable(ink: Floats, covered: Floats) -> Floats:
    """Return the ink, or black or white if the ink is too near the pixels that it covers."""
    if len(covered) and np.linalg.norm(ink - covered.mean(0)) < _MIN_CONTRAST:
        return np.where(covered.mean() > 128, 10, 245) * np.ones(3, dtype=np.float32)
    return ink


def write_beside(
    image: Image.Image, word: str, rng: np.random.Generator, split: str
) -> Image.Image:
    """Return a smaller copy of an image with a word above or below it, in a font of the split."""
    pixels = np.asarray(image.convert("RGB"))
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = Image.new("RGB", (_SIDE, _SIDE), tuple(np.median(rim, axis=0).astype(int).tolist()))
    is_above = bool(rng.integers(2))
    small = Image.fromarray(pixels).resize((_PICTURE, _PICTURE), Image.Resampling.BILINEAR)
    paper.paste(small, ((_SIDE - _PICTURE) // 2, _SIDE - _PICTURE if is_above else 0))
    mask = text_mask(rng, word, any_face(rng, split), scale=rng.uniform(0.75, 0.95))
    rows = np.flatnonzero(mask.max(1) > 0)
    mask = mask[rows[0] : rows[-1] + 1] if len(rows) else mask
    height = min(_BAND, max(1, round(len(mask) * _SIDE / mask.shape[1])))
    stretched = Image.fromarray((255 * mask).astype(np.uint8)).resize((_SIDE, height))
    cover = np.asarray(stretched, dtype=np.float32)[..., None] / 255
    top = (_BAND - height) // 2 + (0 if is_above else _SIDE - _BAND)
    whole = np.array(paper, dtype=np.float32)
    ground = whole[top : top + height]
    names = list(COLORS)
    ink = _readable(color(rng, names[rng.integers(len(names))]), ground[cover[..., 0] > 0.5])
    whole[top : top + height] = ground + cover * (ink - ground)
    return Image.fromarray(np.clip(whole, 0, 255).astype(np.uint8))
