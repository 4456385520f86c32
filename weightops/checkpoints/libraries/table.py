"""The table of supported libraries of models."""

from __future__ import annotations

from pathlib import Path

from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.checkpoints.libraries.timm import TimmArchitecture
from weightops.checkpoints.libraries.transformers import TransformersArchitecture
from weightops.support.registry import Registry

LIBRARIES: Registry[type[Architecture]] = Registry(
    "library of models",
    "libraries",
    {
        "open_clip": OpenClipArchitecture,
        "transformers": TransformersArchitecture,
        "timm": TimmArchitecture,
    },
)
"""Name of a library -> its architecture class, in the order in which they are tried on folders."""


def architecture_of(folder: Path) -> Architecture | None:
    """Return the architecture that a folder describes; None if no library recognises the folder."""
    recognised = (kind.recognise(folder) for kind in LIBRARIES.values())
    return next((architecture for architecture in recognised if architecture is not None), None)
