"""Find the folders of the splits in a folder of images; refuse what may be one and isn't clear."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from weightops.errors import TaskError
from weightops.support.text import first_few
from weightops.tasks.annotations import annotations_of
from weightops.tasks.pictures import image_files, places, subfolders
from weightops.tasks.split_names import HINT, NOT_SCORED, lists_split, looks_like_split, split_of

log = logging.getLogger("weightops")


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the splits by split; none if the folder isn't divided into splits.

    Raises:
        TaskError: if a folder beside those of the splits holds pictures, or names that look like
            splits aren't understood: nothing is left out in silence.
    """
    folders: dict[str, Path] = {}
    others = []
    inner = subfolders(folder)
    # A class may be called like a split; it holds pictures, no folders.
    captioned = bool(inner) and all(split_of(p.name) and is_captioned(p) for p in inner)
    divided = captioned or any(split_of(path.name) and _is_split(path) for path in inner)
    if inner and not divided and all(map(_names_split, inner)):
        raise TaskError(
            f"{folder} has only {first_few([p.name for p in inner])}, with pictures of no class",
            hint="put the pictures of each split into folders by class, or a text file of captions "
            "beside each picture",
        )
    for path in inner:
        split = split_of(path.name)
        if split is None or not divided:
            others.append(path)
        elif not (captioned or _is_split(path)) and any(image_files(path)):
            raise TaskError(
                f"{path} holds pictures of no class",
                hint="put them into folders by class, or move the folder elsewhere",
            )
        elif split in folders:
            names = f"{folders[split].name} and {path.name}"
            raise TaskError(f"{folder} has two folders for {split}: {names}")
        else:
            folders[split] = path
    unclear = [path.name for path in others if _is_unclear(path, bool(folders))]
    if unclear:
        beside = f" beside {', '.join(path.name for path in folders.values())}" if folders else ""
        raise TaskError(
            f"{folder} has{beside} {first_few(unclear)}, which is no split that is understood",
            hint=f"{HINT}, with folders of classes in each; move what belongs to none elsewhere",
        )
    _check_splits(folder, folders)
    lists = [] if folders else [path.name for path in folder.iterdir() if lists_split(path.name)]
    if lists:
        raise TaskError(
            f"{folder} has {first_few(sorted(lists))}, which isn't read, and folders of classes",
            hint=f"sort the pictures into folders by split: {HINT}; or move the file elsewhere, "
            "and the pictures are divided anew",
        )
    return folders


def _names_split(path: Path) -> bool:
    """Return whether a folder's name means a split, or seems to and has no folders of classes."""
    means = split_of(path.name) is not None
    return means or (looks_like_split(path.name) and not subfolders(path))


def _is_split(path: Path) -> bool:
    """Return whether a folder has classes: folders, files named label=..., or a file of them."""
    return bool(subfolders(path) or annotations_of(path)) or any(path.glob("label=*"))


def is_captioned(folder: Path) -> bool:
    """Return whether a folder has pictures in itself, and a text file beside each of them."""
    files = image_files(folder)
    return bool(files) and all(path.with_suffix(".txt").is_file() for path in files)


def _is_unclear(path: Path, has_splits: bool) -> bool:
    """Return whether a folder may be a split of a name that isn't understood."""
    if not has_splits:
        return looks_like_split(path.name) and bool(subfolders(path))
    if not any(image_files(place) for place in places(path)):
        return False
    if path.name.lower() in NOT_SCORED:
        log.warning("%s is in no split: its pictures aren't used", path)
        return False
    return True


def _check_splits(folder: Path, folders: Mapping[str, Path]) -> None:
    if folders and "train" not in folders:
        raise TaskError(
            f"{folder} has {' and '.join(folders)} and no train",
            hint="the three folders are train, val and test",
        )
    if len(folders) == 1:
        raise TaskError(
            f"{folder} has train and no test to confirm an edit on",
            hint="add a folder test, or put the folders of the classes side by side",
        )
