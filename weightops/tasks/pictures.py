"""Read pictures from files: which files are pictures, how they are turned, what is refused."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from weightops.errors import TaskError
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG"),
    *("PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
)
"""Pillow's names of formats that are pixels. Others, such as EPS, start another program."""

_SURE_FORMATS = ("GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats whose files begin in a way that others don't."""

_NO_PICTURES = re.compile(r"\..*|__MACOSX|@eaDir", re.IGNORECASE)
"""Names of files and folders that systems and tools leave behind; a class has no such name."""

_THUMBNAILS = re.compile(r"thumb(nail)?s?", re.IGNORECASE)
"""Names of folders of small copies, inside the folder of a class."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations -> what turns a picture upright."""

_MOST_PIXELS = 100_000_000
"""The most pixels that are decoded: a file of some kilobytes can claim to have any number."""


@cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


@cache
def picture_suffixes() -> frozenset[str]:
    """Return the suffixes of pictures, in lower case."""
    known = _known_formats()
    return frozenset(s for s, name in Image.registered_extensions().items() if name in known)


def unread_suffixes() -> frozenset[str]:
    """Return the suffixes of pictures and films that aren't read."""
    others = {".heic", ".heif", ".jxl", ".svg", ".raw", ".dng", ".nef", ".cr2", ".mp4", ".mov"}
    return (frozenset(Image.registered_extensions()) | others) - picture_suffixes()


def is_left_behind(name: str) -> bool:
    """Return whether a file or folder is hidden, or is what a system or tool has left behind.

    >>> is_left_behind(".ipynb_checkpoints"), is_left_behind("cats")
    (True, False)
    """
    return bool(_NO_PICTURES.fullmatch(name))


def is_copies_folder(name: str) -> bool:
    """Return whether a folder inside a class has copies of pictures, and no pictures of its own."""
    return is_left_behind(name) or bool(_THUMBNAILS.fullmatch(name))


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder by name, without those that are hidden or left behind."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_left_behind(p.name))


def places(folder: Path) -> Iterator[Path]:
    """Yield a class's folder and the folders in it, without those of copies; links are followed."""
    yield folder
    inner: list[Path] = []
    known = {folder.resolve()}  # a link may lead back
    for place, names, _ in os.walk(folder, onerror=_raise, followlinks=True):
        found = [Path(place, name) for name in names if not is_copies_folder(name)]
        new = [path for path in found if path.resolve() not in known]
        known |= {path.resolve() for path in new}
        names[:] = [path.name for path in new]
        inner += new
    yield from sorted(inner)


def _raise(error: OSError) -> None:
    raise error


def image_files(folder: Path) -> list[Path]:
    """Return the images directly in a folder, by name; warn of those that can't be read."""
    listed = [p for p in folder.iterdir() if not is_left_behind(p.name)]
    nowhere = [p.name for p in listed if p.suffix.lower() in picture_suffixes() and not p.exists()]
    if nowhere:
        raise TaskError(
            f"{folder} has {len(nowhere)} links that lead nowhere: {first_few(sorted(nowhere))}",
            hint="fetch what they stand for, as git annex get and dvc pull do, or remove them",
        )
    files = sorted(p for p in listed if p.is_file())
    unread = [p for p in files if p.suffix.lower() in unread_suffixes()]
    if unread:
        log.warning(
            "%d files in %s are left out, which are in no format that is read: %s",
            len(unread),
            folder,
            first_few(path.name for path in unread),
        )
    others = {p.suffix: p for p in files if p.suffix.lower() not in picture_suffixes()}
    unnamed = [path.name for path in others.values() if path not in unread and _opens(path)]
    if unnamed:
        log.warning(
            "%s has pictures that are left out, as their names don't end like a picture's: %s",
            folder,
            first_few(unnamed),
        )
    return [p for p in files if p.suffix.lower() in picture_suffixes()]


def _opens(path: Path) -> bool:
    try:
        with Image.open(path, formats=_SURE_FORMATS):
            return True
    except Exception:  # decoders raise whatever a file leads to
        return False


def read_image(file: Path | IO[bytes], name: str, *, upright: bool = True) -> Image.Image:
    """Read an image as RGB. Pixels of 16 bits are divided by 256.

    Args:
        file: its path or content.
        name: what an error calls the image.
        upright: turn it as its EXIF orientation says; else it stays as it is stored.

    Raises:
        TaskError: if the file isn't an image, or its pixels have 32 bits, whose range isn't known.
    """
    try:
        with Image.open(file, formats=_known_formats()) as image:
            pixels = image.width * image.height
            if pixels > _MOST_PIXELS:
                raise TaskError(f"{name} has {pixels:,} pixels, more than {_MOST_PIXELS:,}")
            wide = image.mode == "F" or (image.mode == "I" and image.format == "TIFF")
            if not wide:
                return (_turned(image) if upright else _eight_bits(image)).convert("RGB")
            bits = f"{'float' if image.mode == 'F' else 'integer'} pixels of 32 bits"
    except (TaskError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever a damaged file leads to
        raise TaskError(f"{name} is not an image that can be read: {error}") from error
    raise TaskError(
        f"{name} has {bits}, whose range isn't known",
        hint="save it with 8 or 16 bits, from its own range",
    )


def _turned(image: Image.Image) -> Image.Image:
    image.load()  # Pillow turns a TIFF as it loads it, and removes its orientation
    turn = _TURNS.get(_orientation(image))
    eight = _eight_bits(image)
    return eight if turn is None else eight.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16 bits with 8, which `convert` would clip; others as they are."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged EXIF block says nothing of the pixels
        return 1
    return orientation if isinstance(orientation, int) else 1
