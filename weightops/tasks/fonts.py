"""Fonts from packages on PyPI, by style and split. No font is in two splits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from weightops.errors import missing_extra


class Face(NamedTuple):
    """A font: its file ("" is the font built into Pillow) and the weight of a variable font."""

    path: str
    weight: int | None = None


# style -> split -> (package, file, weight of a variable font); an empty package is Pillow itself
_FACES: dict[str, dict[str, list[tuple[str, str, int | None]]]] = {
    "serif": {
        "train": [("matplotlib", f"DejaVuSerif{v}.ttf", None) for v in ("", "-Bold", "-Italic")],
        "validation": [("matplotlib", f"STIXGeneral{v}.ttf", None) for v in ("", "Bol", "Italic")],
        "test": [("fontpkg_lora", "Lora[wght].ttf", w) for w in (400, 700)],
    },
    "sans-serif": {
        "train": [("matplotlib", f"DejaVuSans{v}.ttf", None) for v in ("", "-Bold", "-Oblique")],
        "validation": [("", "", None)],
        "test": [("font_lato", f"Lato-{v}.ttf", None) for v in ("Regular", "Bold", "Italic")],
    },
    "monospace": {
        "train": [
            ("matplotlib", f"DejaVuSansMono{v}.ttf", None) for v in ("", "-Bold", "-Oblique")
        ],
        "validation": [
            ("fontpkg_inconsolata", "Inconsolata[wdth,wght].ttf", w) for w in (400, 700)
        ],
        "test": [("fontpkg_roboto_mono", "RobotoMono[wght].ttf", w) for w in (400, 700)],
    },
    "handwritten": {
        "train": [("fontpkg_caveat", "Caveat[wght].ttf", w) for w in (400, 700)],
        "validation": [("fontpkg_kalam", f"Kalam-{v}.ttf", None) for v in ("Regular", "Bold")],
        "test": [("fontpkg_indie_flower", "IndieFlower-Regular.ttf", None)],
    },
}

STYLES = tuple(_FACES)


def faces(style: str, split: str) -> list[Face]:
    """Return the fonts of one style in one split.

    Raises:
        MissingExtraError: if a package that contains them is not installed.
    """
    return [
        Face(_locate(package, file) if package else "", weight)
        for package, file, weight in _FACES[style][split]
    ]


def _locate(package: str, file: str) -> str:
    """Return the path of a font in a package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra(package.replace("_", "-"), "demo", "to draw text in held-out fonts")
    folder = "mpl-data/fonts/ttf" if package == "matplotlib" else "files"
    return str(Path(spec.submodule_search_locations[0], folder, file))
