"""TODO."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from weightops.errors import CheckpointError


def sibling(path: Path, name: str) -> Path:
    """The file of that name beside another, or where the links of a cache put all files of its kind.

    Raises:
        CheckpointError: if it is missing, or lies elsewhere.
    """
    if Path(name).name != name or "\0" in name or len(name) > 255:
        raise CheckpointError(f"{path} points to {name[:80]!r}, outside its folder")
    file = path.parent / name
    if not file.is_file():
        raise CheckpointError(
            f"{path} lists {name}, which is missing: the download or copy is incomplete"
        )
    if file.resolve().parent not in (path.parent.resolve(), path.resolve().parent):
        raise CheckpointError(
            f"{path} points to {name}, a link to {file.resolve()}, outside its folder"
        )
    return file


def copy_siblings(config: Path, patterns: Iterable[str], folder: Path) -> None:
    """Copy the files beside a configuration that match patterns into a folder.

    Raises:
        CheckpointError: if one is a link to elsewhere.
    """
    for name in sorted(
        {
            path.name
            for pattern in patterns
            for path in config.parent.glob(pattern)
            if path.is_file()
        }
    ):
        shutil.copyfile(sibling(config, name), folder / name)
