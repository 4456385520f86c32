"""Files that a checkpoint's file names, which must be in its own folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from weightops.errors import CheckpointError


def sibling(path: Path, name: str) -> Path:
    """Return the file of this name beside ``path``.

    Links are followed if they lead to the folder of ``path`` or of its own link's target, as the
    links of the Hub's cache do.

    Raises:
        CheckpointError: if the file is missing or is in another folder.
    """
    if Path(name).name != name or "\0" in name or len(name) > 255:
        raise CheckpointError(f"{path} points to {name[:80]!r}, outside its folder")
    file = path.parent / name
    if not file.is_file():
        raise CheckpointError(
            f"{path} lists {name}, which is missing", hint="download or copy the folder again"
        )
    if file.resolve().parent not in (path.parent.resolve(), path.resolve().parent):
        raise CheckpointError(
            f"{path} points to {name}, a link to {file.resolve()}, outside its folder"
        )
    return file


def copy_siblings(config: Path, patterns: Iterable[str], folder: Path) -> None:
    """Copy the files beside a configuration that match a pattern into a folder.

    Raises:
        CheckpointError: if one of them is a link to another folder.
    """
    matching = {path for pattern in patterns for path in config.parent.glob(pattern)}
    for name in sorted(path.name for path in matching if path.is_file()):
        shutil.copyfile(sibling(config, name), folder / name)
