"""Draw masks of shapes, textures and text from a random generator.

A mask is a ``float32`` array in [0, 1] of shape ``(SIZE, SIZE)``. It depends on the generator only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from weightops.tasks.fonts import Face

Floats = npt.NDArray[np.float32]

SIZE = 64
"""Pixels of a side of every mask."""

_CANVAS = 2 * SIZE  # masks are drawn twice as large and reduced, which smooths their edges


# ---------------------------------------------------------------- shapes


Outline = npt.NDArray[np.complex128]
"""Corners of a polygon in the complex plane, y down."""


def _polygon(*points: complex) -> Outline:
    return np.array(points, dtype=np.complex128)


def _star(tips: int, inner: float) -> Outline:
    corners = np.arange(2 * tips)
    radius = np.where(corners % 2 == 0, 1.0, inner)
    angle = corners * math.pi / tips - math.pi / 2
    return np.asarray(radius * np.exp(1j * angle), dtype=np.complex128)


_TURN = np.linspace(0, 2 * math.pi, 48, endpoint=False)
_CIRCLE = np.exp(1j * _TURN)
_HEART = (
    16 * np.sin(_TURN) ** 3
    - 1j * (13 * np.cos(_TURN) - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN) - np.cos(4 * _TURN))
) / 17

_CROSS_ARM = (0.33 - 0.99j, 0.33 - 0.33j, 0.99 - 0.33j)

SHAPES: dict[str, tuple[Outline, Outline | None]] = {
    "circle": (_CIRCLE, None),
    "square": (0.85 * _polygon(-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j), None),
    "triangle": (_polygon(-1j, 0.95 + 0.75j, -0.95 + 0.75j), None),
    "star": (_star(5, 0.42), None),
    "cross": (_polygon(*(i * turn for turn in (1, 1j, -1, -1j) for i in _CROSS_ARM)), None),
    "heart": (_HEART, None),
    "ring": (_CIRCLE, 0.58 * _CIRCLE),
    "diamond": (_polygon(-1j, 0.62 + 0j, 1j, -0.62 + 0j), None),
    "moon": (_CIRCLE, 0.82 * _CIRCLE + 0.5),
    "arrow": (
        _polygon(-1j, 0.8 - 0.1j, 0.3 - 0.1j, 0.3 + 1j, -0.3 + 1j, -0.3 - 0.1j, -0.8 - 0.1j),
        None,
    ),
}
"""Outline and hole of each shape, within the unit circle or nearly so."""


def shape_mask(rng: np.random.Generator, shape: str, count: int = 1) -> Floats:
    """Return the mask of ``count`` copies of a shape, apart, each turned and scaled a little."""
    quarter = 1j ** int(rng.integers(4)) if shape == "arrow" else 1
    return placed_shape(rng, shape, _places(rng, count), quarter)


def placed_shape(
    rng: np.random.Generator,
    shape: str,
    places: Iterable[tuple[float, float, float]],
    quarter: complex = 1,
) -> Floats:
    """Return the mask of copies of a shape, each turned a little.

    Args:
        rng: the source of randomness.
        shape: a name in `SHAPES`.
        places: x, y and radius of each copy, as shares of the side.
        quarter: a turn of all copies, as a complex number.
    """
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    pen = ImageDraw.Draw(canvas)
    outline, hole = SHAPES[shape]
    for x, y, radius in places:
        angle = rng.uniform(-0.26, 0.26)
        turn_and_scale = quarter * (radius * _CANVAS) * complex(math.cos(angle), math.sin(angle))
        for points, fill in ((outline, 255), (hole, 0)):
            if points is not None:
                placed = points * turn_and_scale + complex(x * _CANVAS, y * _CANVAS)
                pen.polygon(list(zip(placed.real, placed.imag, strict=True)), fill=fill)
    return _reduce(canvas)


def _places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Return centres and radii, as shares of the side, of ``count`` discs that don't touch."""
    largest = 0.40 if count == 1 else 0.42 / math.sqrt(count + 1)
    while True:
        radius = rng.uniform(0.6, 1.0) * largest
        margin = radius if count > 1 else max(radius, 0.34)
        centres = rng.uniform(margin, 1 - margin, (count, 2))
        gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1)[np.triu_indices(count, 1)]
        if gaps.size == 0 or gaps.min() > 2.15 * radius:
            return [(x, y, radius) for x, y in centres]


# -------------------------------------------------------------- textures

_STEPS = np.arange(SIZE, dtype=np.float32) / SIZE
_Y, _X = np.meshgrid(_STEPS, _STEPS, indexing="ij")


def _wave(t: Floats) -> Floats:
    """Return a square wave of period 1 with slightly soft edges, in [0, 1]."""
    values: Floats = np.clip(0.5 + 6 * np.sin(2 * math.pi * t), 0, 1, dtype=np.float32)
    return values


def _cells(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return x and y coordinates in units of a random period, with random phases."""
    frequency, x_phase, y_phase = rng.uniform(2.5, 6.0), rng.uniform(), rng.uniform()
    x = _X * np.float32(frequency) + np.float32(x_phase)
    return x, _Y * np.float32(frequency) + np.float32(y_phase)


def _concentric(rng: np.random.Generator) -> Floats:
    cx, cy = rng.uniform(0.3, 0.7, 2)
    return _wave(np.hypot(_X - np.float32(cx), _Y - np.float32(cy)) * np.float32(rng.uniform(4, 7)))


def _gradient(rng: np.random.Generator) -> Floats:
    angle = rng.uniform(0, 2 * math.pi)
    along = (_X - 0.5) * np.float32(math.cos(angle)) + (_Y - 0.5) * np.float32(math.sin(angle))
    values: Floats = np.clip(
        0.5 + along * np.float32(rng.uniform(0.8, 1.2)), 0, 1, dtype=np.float32
    )
    return values


def _dots(rng: np.random.Generator) -> Floats:
    x, y = _cells(rng)
    inside = np.float32(rng.uniform(0.25, 0.36)) - np.hypot(x % 1 - 0.5, y % 1 - 0.5)
    values: Floats = np.clip(inside * 12 + 0.5, 0, 1, dtype=np.float32)
    return values


def _grid(rng: np.random.Generator) -> Floats:
    x, y = _cells(rng)
    return (np.minimum(x % 1, y % 1) < rng.uniform(0.14, 0.24)).astype(np.float32)


def _zigzag(rng: np.random.Generator) -> Floats:
    x, y = _cells(rng)
    return _wave(y + np.float32(rng.uniform(0.7, 1.2)) * np.abs(x % 1 - 0.5))


def _checks(rng: np.random.Generator) -> Floats:
    x, y = _cells(rng)
    return ((np.floor(x) + np.floor(y)) % 2).astype(np.float32)


def _diagonal(rng: np.random.Generator) -> Floats:
    x, y = _cells(rng)
    return _wave((x + y * rng.choice([-1, 1]).astype(np.float32)) * np.float32(0.7))


def _speckles(rng: np.random.Generator) -> Floats:
    cells = rng.random((SIZE // 2, SIZE // 2), dtype=np.float32) < 0.5
    return cells.astype(np.float32).repeat(2, 0).repeat(2, 1)


TEXTURES: dict[str, Callable[[np.random.Generator], Floats]] = {
    "horizontal stripes": lambda rng: _wave(_cells(rng)[1]),
    "vertical stripes": lambda rng: _wave(_cells(rng)[0]),
    "diagonal stripes": _diagonal,
    "checkerboard": _checks,
    "polka dots": _dots,
    "grid": _grid,
    "speckles": _speckles,
    "gradient": _gradient,
    "zigzag": _zigzag,
    "concentric circles": _concentric,
}
"""Functions that draw the mask of a texture."""


# ------------------------------------------------------------------ text


@lru_cache(maxsize=4096)
def _font(face: Face, pixels: int) -> ImageFont.FreeTypeFont:
    """Return a font at a size in pixels."""
    path, weight = face
    if not path:
        font = ImageFont.load_default(pixels)
        if not isinstance(font, ImageFont.FreeTypeFont):  # a Pillow built without FreeType
            raise OSError("this Pillow was built without FreeType and can't draw text")
        return font
    font = ImageFont.truetype(path, pixels)
    if weight is not None:
        axes = font.get_variation_axes()
        font.set_variation_by_axes(
            [float(weight if axis["name"] == b"Weight" else axis["default"] or 0) for axis in axes]
        )
    return font


def text_mask(
    rng: np.random.Generator, text: str, face: Face, *, scale: float = 0.75, warp: float = 0.0
) -> Floats:
    """Return the mask of a text that is turned, sheared, stretched and moved a little.

    Args:
        rng: the source of randomness.
        text: the text, on one line.
        face: the font.
        scale: the larger of the text's width and height, as a fraction of the mask's side.
        warp: strength of an elastic distortion, 0 for none.
    """
    font = _font(face, _font_pixels(rng, text, face, scale))
    left, top, right, bottom = font.getbbox(text)
    stroke = int(rng.choice([0, 0, 0, 1, 2])) if scale > 0.6 and len(text) == 1 else 0
    at = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(canvas).text(at, text, fill=255, font=font, stroke_width=stroke)
    canvas = _affine(rng, canvas, max(0.0, 0.5 - scale / 2) * _CANVAS, is_word=len(text) > 1)
    return _reduce(_elastic(rng, canvas, warp) if warp else canvas)


def _font_pixels(rng: np.random.Generator, text: str, face: Face, scale: float) -> int:
    """Return the font size at which the text has about the wanted extent on the canvas."""
    wanted = 8 * max(2, round(_CANVAS * scale * rng.uniform(0.8, 1.05) / 8))
    left, top, right, bottom = _font(face, wanted).getbbox(text)
    extent = max(right - left, bottom - top, 1)
    return int(min(max(10, 2 * round(wanted * wanted / extent / 2)), 3 * _CANVAS // 2))


def _affine(
    rng: np.random.Generator, canvas: Image.Image, slack: float, *, is_word: bool
) -> Image.Image:
    """Turn, shear, stretch and move a canvas at random, by up to ``slack`` pixels."""
    angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
    stretch = np.exp(rng.uniform(-0.14, 0.14))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ [[stretch, shear], [0, 1 / stretch]]
    dx, dy = rng.uniform(-slack, slack, 2)
    if is_word:  # which is about as wide as the canvas
        dx = 0.3 * dx
    half = _CANVAS / 2
    tx, ty = half - matrix @ (half + dx, half + dy)
    return canvas.transform(
        (_CANVAS, _CANVAS),
        Image.Transform.AFFINE,
        (matrix[0, 0], matrix[0, 1], tx, matrix[1, 0], matrix[1, 1], ty),
        Image.Resampling.BILINEAR,
    )


def _elastic(rng: np.random.Generator, canvas: Image.Image, strength: float) -> Image.Image:
    """Move the inner corners of a 4 x 4 mesh at random."""
    step = _CANVAS // 4
    grid = np.meshgrid(np.arange(5) * step, np.arange(5) * step, indexing="ij")
    corners = np.stack(grid, -1).astype(float)
    corners += rng.normal(0, strength * step, corners.shape)
    mesh: list[tuple[tuple[int, int, int, int], Any]] = []
    for i, j in np.ndindex(4, 4):
        target = (j * step, i * step, (j + 1) * step, (i + 1) * step)
        quad = [corners[i, j], corners[i + 1, j], corners[i + 1, j + 1], corners[i, j + 1]]
        mesh.append((target, tuple(value for y, x in quad for value in (x, y))))
    return canvas.transform(canvas.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _reduce(canvas: Image.Image) -> Floats:
    """Return a canvas as a mask of half its side."""
    values: Floats = np.asarray(canvas.reduce(2), dtype=np.float32) / np.float32(255)
    return values
