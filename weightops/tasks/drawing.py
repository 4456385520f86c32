"""Draw small labelled pictures: shapes, textures and glyphs, from a random generator and nothing else.

Every function is deterministic in its generator, so a picture is named by a seed. Pictures are
``uint8`` arrays of shape ``(SIZE, SIZE, 3)``; masks are ``float32`` arrays in [0, 1] of shape ``(SIZE, SIZE)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from weightops.tasks.fonts import Face

Floats = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]

SIZE = 64
_CANVAS = 2 * SIZE  # masks are drawn twice as large and reduced, which smooths their edges

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


def color(rng: np.random.Generator, name: str) -> Floats:
    """An RGB value (three floats, 0 to 255) near the named colour."""
    return np.clip(np.asarray(COLORS[name]) + rng.normal(0, 9, 3), 0, 255).astype(np.float32)


def contrasting_colors(rng: np.random.Generator, first: str | None = None) -> tuple[str, str]:
    """Two names of colours that can be told apart; the first may be given."""
    names = list(COLORS)
    while True:
        a, b = first or str(rng.choice(names)), str(rng.choice(names))
        if math.dist(COLORS[a], COLORS[b]) > 150:
            return a, b


# ---------------------------------------------------------------- shapes


def _polygon(*points: complex) -> npt.NDArray[np.complex128]:
    return np.array(points, dtype=np.complex128)


def _star(tips: int, inner: float) -> npt.NDArray[np.complex128]:
    corners = np.arange(2 * tips)
    radius = np.where(corners % 2 == 0, 1.0, inner)
    return np.asarray(
        radius * np.exp(1j * (corners * math.pi / tips - math.pi / 2)), dtype=np.complex128
    )


_TURN = np.linspace(0, 2 * math.pi, 48, endpoint=False)
_CIRCLE = np.exp(1j * _TURN)
_HEART = (
    16 * np.sin(_TURN) ** 3
    - 1j * (13 * np.cos(_TURN) - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN) - np.cos(4 * _TURN))
) / 17

# Outline and hole of each shape in the complex plane, y down, within the unit circle or nearly so.
SHAPES: dict[str, tuple[npt.NDArray[np.complex128], npt.NDArray[np.complex128] | None]] = {
    "circle": (_CIRCLE, None),
    "square": (0.85 * _polygon(-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j), None),
    "triangle": (_polygon(-1j, 0.95 + 0.75j, -0.95 + 0.75j), None),
    "star": (_star(5, 0.42), None),
    "cross": (
        _polygon(
            *(
                i * turn
                for turn in (1, 1j, -1, -1j)
                for i in (0.33 - 0.99j, 0.33 - 0.33j, 0.99 - 0.33j)
            )
        ),
        None,
    ),
    "heart": (_HEART, None),
    "ring": (_CIRCLE, 0.58 * _CIRCLE),
    "diamond": (_polygon(-1j, 0.62 + 0j, 1j, -0.62 + 0j), None),
    "moon": (_CIRCLE, 0.82 * _CIRCLE + 0.5),
    "arrow": (
        _polygon(-1j, 0.8 - 0.1j, 0.3 - 0.1j, 0.3 + 1j, -0.3 + 1j, -0.3 - 0.1j, -0.8 - 0.1j),
        None,
    ),
}


def shape_mask(rng: np.random.Generator, shape: str, count: int = 1) -> Floats:
    """``count`` copies of a shape that don't touch, each turned and scaled a little."""
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    draw = ImageDraw.Draw(canvas)
    outline, hole = SHAPES[shape]
    quarter = 1j ** int(rng.integers(4)) if shape == "arrow" else 1
    for x, y, radius in _places(rng, count):
        angle = rng.uniform(-0.26, 0.26)
        move = quarter * radius * complex(math.cos(angle), math.sin(angle))
        for points, fill in ((outline, 255), (hole, 0)):
            if points is not None:
                placed = points * move + complex(x, y)
                draw.polygon(list(zip(placed.real, placed.imag, strict=True)), fill=fill)
    return _reduce(canvas)


def _places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Centres and radii, in canvas pixels, of ``count`` discs that don't touch."""
    largest = 0.40 if count == 1 else 0.42 / math.sqrt(count + 1)
    while True:
        radius = rng.uniform(0.6, 1.0) * largest
        centres = (
            rng.uniform(radius, 1 - radius, (count, 2))
            if count > 1
            else rng.uniform(max(radius, 0.34), 1 - max(radius, 0.34), (1, 2))
        )
        gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1)[np.triu_indices(count, 1)]
        if gaps.size == 0 or gaps.min() > 2.15 * radius:
            return [(x * _CANVAS, y * _CANVAS, radius * _CANVAS) for x, y in centres]


# -------------------------------------------------------------- textures

_Y, _X = np.meshgrid(
    np.arange(SIZE, dtype=np.float32) / SIZE,
    np.arange(SIZE, dtype=np.float32) / SIZE,
    indexing="ij",
)


def _wave(t: Floats) -> Floats:
    """A square wave of period 1 with slightly soft edges, in [0, 1]."""
    values: Floats = np.clip(0.5 + 6 * np.sin(2 * math.pi * t), 0, 1, dtype=np.float32)
    return values


def _cells(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Coordinates in units of a random period with a random phase."""
    f, px, py = rng.uniform(2.5, 6.0), rng.uniform(), rng.uniform()
    return _X * np.float32(f) + np.float32(px), _Y * np.float32(f) + np.float32(py)


def _concentric(rng: np.random.Generator) -> Floats:
    cx, cy = rng.uniform(0.3, 0.7, 2)
    return _wave(np.hypot(_X - np.float32(cx), _Y - np.float32(cy)) * np.float32(rng.uniform(4, 7)))


def _gradient(rng: np.random.Generator) -> Floats:
    angle = rng.uniform(0, 2 * math.pi)
    t = (_X - 0.5) * np.float32(math.cos(angle)) + (_Y - 0.5) * np.float32(math.sin(angle))
    values: Floats = np.clip(0.5 + t * np.float32(rng.uniform(0.8, 1.2)), 0, 1, dtype=np.float32)
    return values


def _dots(rng: np.random.Generator) -> Floats:
    u, v = _cells(rng)
    distance = np.hypot(u % 1 - 0.5, v % 1 - 0.5)
    values: Floats = np.clip(
        (np.float32(rng.uniform(0.25, 0.36)) - distance) * 12 + 0.5, 0, 1, dtype=np.float32
    )
    return values


def _grid(rng: np.random.Generator) -> Floats:
    u, v = _cells(rng)
    width = rng.uniform(0.14, 0.24)
    return (np.minimum(u % 1, v % 1) < width).astype(np.float32)


def _zigzag(rng: np.random.Generator) -> Floats:
    u, v = _cells(rng)
    return _wave(v + np.float32(rng.uniform(0.7, 1.2)) * np.abs(u % 1 - 0.5))


def _checks(rng: np.random.Generator) -> Floats:
    u, v = _cells(rng)
    return ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)


def _diagonal(rng: np.random.Generator) -> Floats:
    u, v = _cells(rng)
    return _wave((u + v * rng.choice([-1, 1]).astype(np.float32)) * np.float32(0.7))


def _speckles(rng: np.random.Generator) -> Floats:
    return (
        (rng.random((SIZE // 2, SIZE // 2), dtype=np.float32) < 0.5)
        .astype(np.float32)
        .repeat(2, 0)
        .repeat(2, 1)
    )


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


# ---------------------------------------------------------------- glyphs


@lru_cache(maxsize=4096)
def _font(face: Face, pixels: int) -> ImageFont.FreeTypeFont:
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
    """``text`` in a font, turned, sheared, stretched and moved a little.

    Args:
        rng: the source of all that is random.
        text: what to write, on one line.
        face: the font.
        scale: the larger of the text's width and height, as a fraction of the picture.
        warp: strength of an elastic distortion, 0 for none.
    """
    pixels = 8 * max(2, round(_CANVAS * scale * rng.uniform(0.8, 1.05) / 8))
    box = _font(face, pixels).getbbox(text)
    extent = max(box[2] - box[0], box[3] - box[1], 1)
    pixels = max(10, 2 * round(pixels * pixels / extent / 2))
    font = _font(face, min(pixels, 3 * _CANVAS // 2))
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    left, top, right, bottom = font.getbbox(text)
    stroke = int(rng.choice([0, 0, 0, 1, 2])) if scale > 0.6 and len(text) == 1 else 0
    at = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(at, text, fill=255, font=font, stroke_width=stroke)
    angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
    stretch = np.exp(rng.uniform(-0.14, 0.14))
    matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ [
        [stretch, shear],
        [0, 1 / stretch],
    ]
    slack = max(0.0, 0.5 - scale / 2) * _CANVAS
    dx, dy = rng.uniform(-slack, slack, 2)
    if len(text) > 1:
        dx = 0.3 * dx
    half = _CANVAS / 2
    tx, ty = half - matrix @ (half + dx, half + dy)
    canvas = canvas.transform(
        (_CANVAS, _CANVAS),
        Image.Transform.AFFINE,
        (matrix[0, 0], matrix[0, 1], tx, matrix[1, 0], matrix[1, 1], ty),
        Image.Resampling.BILINEAR,
    )
    return _reduce(_elastic(rng, canvas, warp) if warp else canvas)


def _elastic(rng: np.random.Generator, canvas: Image.Image, strength: float) -> Image.Image:
    """Move the inner corners of a 4 x 4 mesh at random."""
    step = _CANVAS // 4
    corners = np.stack(
        np.meshgrid(np.arange(5) * step, np.arange(5) * step, indexing="ij"), -1
    ).astype(float)
    corners += rng.normal(0, strength * step, corners.shape)
    mesh: list[tuple[tuple[int, int, int, int], Any]] = []
    for i in range(4):
        for j in range(4):
            quad = [corners[i, j], corners[i + 1, j], corners[i + 1, j + 1], corners[i, j + 1]]
            mesh.append(
                (
                    (j * step, i * step, (j + 1) * step, (i + 1) * step),
                    tuple(v for y, x in quad for v in (x, y)),
                )
            )
    return canvas.transform(canvas.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _reduce(canvas: Image.Image) -> Floats:
    values: Floats = np.asarray(canvas.reduce(2), dtype=np.float32) / np.float32(255)
    return values


# ----------------------------------------------------------- composition


def backdrop(rng: np.random.Generator, name: str) -> Floats:
    """A background of one named colour: plain, shaded, speckled or faintly patterned. Shape (SIZE, SIZE, 3)."""
    base = color(rng, name)
    kind = rng.random()
    if kind < 0.4:
        return np.tile(base, (SIZE, SIZE, 1))
    other = np.clip(base + rng.uniform(-45, 45), 0, 255)
    if kind < 0.6:
        pattern = _gradient(rng)
    elif kind < 0.8:
        pattern = rng.random((SIZE, SIZE), dtype=np.float32)
    else:
        pattern = TEXTURES[
            str(
                rng.choice(
                    ["horizontal stripes", "vertical stripes", "diagonal stripes", "checkerboard"]
                )
            )
        ](rng)
    values: Floats = base + pattern[..., None] * (other - base).astype(np.float32)
    return values


def compose(mask: Floats, ink: Floats, ground: Floats) -> Floats:
    """``ink`` (a colour or a picture) over ``ground`` where ``mask`` is 1."""
    return ground + mask[..., None] * (ink - ground)


def expose(rng: np.random.Generator, image: Floats) -> Picture:
    """The picture as a mediocre camera would take it: a little noise and contrast."""
    image = (image - 128) * np.float32(rng.uniform(0.8, 1.05)) + np.float32(
        128 + rng.uniform(-12, 12)
    )
    if rng.random() < 0.6:
        image = image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(
            rng.uniform(0, 18)
        )
    return np.clip(image, 0, 255).astype(np.uint8)


def picture(rng: np.random.Generator, mask: Floats, ink: str, ground: str) -> Picture:
    """A mask in one named colour on a backdrop of another."""
    return expose(rng, compose(mask, color(rng, ink), backdrop(rng, ground)))


def texture(rng: np.random.Generator, name: str, ink: str, ground: str) -> Picture:
    """A texture in two named colours."""
    return expose(rng, compose(TEXTURES[name](rng), color(rng, ink), color(rng, ground)))


def glyphs(
    rng: np.random.Generator,
    text: str,
    face: Face,
    *,
    colors: tuple[str, str] | None = None,
    warp: float = 0.0,
) -> Picture:
    """A letter, digit or word in two named colours, or in two that contrast, often white on black or black on white."""
    mask = text_mask(rng, text, face, scale=0.75 if len(text) == 1 else 0.95, warp=warp)
    if colors is None and rng.random() < 0.3:
        colors = ("white", "black") if rng.random() < 0.6 else ("black", "white")
    return picture(rng, mask, *(colors or contrasting_colors(rng)))
