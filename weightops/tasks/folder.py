"""Tasks from a folder of images."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.support.text import first_few
from weightops.tasks.class_names import in_words
from weightops.tasks.copies import warn_of_copies
from weightops.tasks.pictures import (
    is_copies_folder,
    is_left_behind,
    picture_suffixes,
    read_image,
    unread_suffixes,
)
from weightops.tasks.split import split_images, split_loader
from weightops.tasks.split_names import HINT, NOT_SCORED, looks_like_split, split_of
from weightops.tasks.task import PROMPTS, SPLITS, Captions, Images, Task, read_lines, read_prompts

log = logging.getLogger("weightops")

PROMPTS_FILE = "prompts.txt"
"""A file in the folder with one prompt a line, ``{}`` for the class, for the default prompts."""

_UNSPLIT = "all"
_LABELLED = re.compile(r"label=(?P<label>.+?)(?:_text=(?P<text>.+?)(?:_\d+)?)?$")

LabelledFile = tuple[Path, str]
"""The path of an image and the name of its class."""


@dataclass(frozen=True)
class FolderImages:
    """Images in files, each opened when it is accessed."""

    files: Sequence[Path]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        path = self.files[index]
        return read_image(path, str(path))

    def encoded(self, index: int, most: int = -1) -> bytes:
        """Return the content of the file of an image."""
        with open(self.files[index], "rb") as stream:
            return stream.read(most)

    def encoded_size(self, index: int) -> int:
        """Return the size of the file of an image."""
        return self.files[index].stat().st_size

    @cached_property
    def captions(self) -> Captions | None:
        """The lines of the text files beside the images, or None if there are no such files.

        Raises:
            TaskError: if only some images have captions, or a text file is empty or unreadable.
        """
        texts = [path.with_suffix(".txt") for path in self.files]
        missing = [text for text in texts if not text.is_file()]
        if missing and len(missing) < len(texts):
            captioned = len(texts) - len(missing)
            raise TaskError(
                f"{missing[0]} is missing: {captioned} other pictures have captions beside them"
            )
        return None if missing else [read_lines(text) for text in texts]


def folder_task(folder: Path) -> Task:
    """Return the task of a folder of images.

    The folder has one of these layouts:

    * ``{train,val,test}/CLASS/*.png``; other names of splits are in `split_names`. Without
      ``val``, a tenth of the training images (at most 5,000) is for validation. Without ``test``,
      ``val`` is the test split.
    * ``CLASS/*.png``: 70 % of the images are for training, 10 % for validation, 20 % for the test,
      classes in proportion, the same in every process.
    * Either of these with files called ``label=CLASS.png`` or ``label=CLASS_text=WORD_1.png`` in
      place of folders for the classes, as PAINT's photographs of typographic attacks are called.
      The words are classes, too.

    Classes are in the order of their folders' names, as in torchvision's ``ImageFolder``. In
    prompts, underscores become blanks. Folders inside the folder of a class belong to that class,
    but for hidden ones and thumbnails.

    Args:
        folder: the folder. If it holds ``prompts.txt``, its lines are the prompts, with ``{}`` for
            the class.

    Raises:
        TaskError: if the folder has another layout, or too few images, or a split or class that
            isn't understood.
    """
    if not folder.is_dir():
        raise TaskError(
            f"there is no folder {folder}",
            hint="a task is one of `weightops tasks` or a folder of images in folders by class",
        )
    split_folders = _split_folders(folder) or {_UNSPLIT: folder}
    files = {split: _labelled_files(path) for split, path in split_folders.items()}
    _check_every_class(files, split_folders)
    classes = _class_names(files)
    if len(classes) < 2:
        raise TaskError(
            f"{folder} holds {sum(map(len, files.values()))} images of {len(classes)} classes",
            hint=f"expected {folder}/CLASS/*.png with two classes at least, "
            f"{folder}/{{train,val,test}}/CLASS/*.png, or files named label=CLASS_text=WORD.png",
        )
    images = _images_by_split(files, classes)
    sizes = {split: len(images[split]) for split in SPLITS}
    empty = [split for split, size in sizes.items() if not size]
    if empty:
        raise TaskError(
            f"{folder} has too few images: none are left for {' and '.join(empty)} ({sizes})"
        )
    prompts = read_prompts(folder / PROMPTS_FILE) if (folder / PROMPTS_FILE).is_file() else PROMPTS
    warn_once = cache(lambda: warn_of_copies(images, str(folder)))

    def load(split: str) -> Images:
        warn_once()
        return images[split]

    name, source = folder.resolve().name, f"the folder {folder}"
    spoken = tuple(map(in_words, classes))
    return Task(name, spoken, prompts, load, sizes, source, "its owner's", classes)


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the splits by split; none if the folder isn't divided into splits.

    Raises:
        TaskError: if a folder beside those of the splits holds pictures, or names that look like
            splits aren't understood: nothing is left out in silence.
    """
    folders: dict[str, Path] = {}
    others = []
    for path in _subfolders(folder):
        split = split_of(path.name)
        # A class may be called like a split; it holds pictures, no folders.
        if split is None or not (_subfolders(path) or any(path.glob("label=*"))):
            others.append(path)
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
    return folders


def _is_unclear(path: Path, has_splits: bool) -> bool:
    """Return whether a folder may be a split of a name that isn't understood."""
    if not has_splits:
        return looks_like_split(path.name) and bool(_subfolders(path))
    if not any(_image_files(place) for place in _places(path)):
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


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_left_behind(p.name))


def _places(folder: Path) -> Iterator[Path]:
    """Yield a class's folder and the folders in it, without those of copies."""
    yield folder
    inner: list[Path] = []
    for place, names, _ in os.walk(folder):
        names[:] = [name for name in names if not is_copies_folder(name)]
        inner += [Path(place, name) for name in names]
    yield from sorted(inner)


def _image_files(folder: Path) -> list[Path]:
    """Return the images directly in a folder, by name; warn of those that can't be read."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not is_left_behind(p.name))
    unread = [p for p in files if p.suffix.lower() in unread_suffixes()]
    if unread:
        log.warning(
            "%d files in %s are left out, which are in no format that is read: %s",
            len(unread),
            folder,
            first_few(path.name for path in unread),
        )
    return [p for p in files if p.suffix.lower() in picture_suffixes()]


def _labelled_files(folder: Path) -> list[LabelledFile]:
    """Return the images of a split, by name, with their classes."""
    by_folder: list[LabelledFile] = []
    for class_folder in _subfolders(folder):
        files = [path for place in _places(class_folder) for path in _image_files(place)]
        by_folder += [(path, class_folder.name) for path in files]
    matches = {path: _LABELLED.match(path.stem) for path in _image_files(folder)}
    unlabelled = [path.name for path, match in matches.items() if not match]
    if unlabelled:
        raise TaskError(
            f"{folder} holds {len(unlabelled)} images outside of any class: "
            f"{first_few(unlabelled)}",
            hint="put them into folders by class, or name them label=CLASS_text=WORD",
        )
    if by_folder and matches:
        raise TaskError(
            f"{folder} holds images in folders by class and images named label=...",
            hint="give one of the two",
        )
    return by_folder or [(p, in_words(match["label"])) for p, match in matches.items() if match]


def _class_names(files: Mapping[str, Sequence[LabelledFile]]) -> tuple[str, ...]:
    """Return all classes as folders are called, with those that are only written over images.

    Their order is that of torchvision's ``ImageFolder``: by character, capitals before the others.

    Raises:
        TaskError: if two folders differ only in underscores and blanks.
    """
    labelled = [file for split_files in files.values() for file in split_files]
    labels = {label for _, label in labelled}
    matches = [_LABELLED.match(path.stem) for path, _ in labelled]
    words = {in_words(match["text"]) for match in matches if match and match["text"]}
    names = sorted(labels | words)
    spoken = [in_words(name) for name in names]
    twice = [name for name in names if spoken.count(in_words(name)) > 1]
    if twice:
        raise TaskError(f"two classes have one name but for underscores: {first_few(twice)}")
    return tuple(names)


def _check_every_class(
    files: Mapping[str, Sequence[LabelledFile]], folders: Mapping[str, Path]
) -> None:
    """Refuse a class that only one of several splits has; an empty folder is enough to have it."""
    present = {
        split: {label for _, label in labelled} | {p.name for p in _subfolders(folders[split])}
        for split, labelled in files.items()
    }
    for split, labelled in files.items():
        elsewhere = set().union(*(names for other, names in present.items() if other != split))
        alone = sorted({label for _, label in labelled} - elsewhere)
        if alone and len(files) > 1:
            raise TaskError(
                f"{first_few(alone)}: only {folders[split]} has this class, not "
                f"{' and '.join(str(f) for s, f in folders.items() if s != split)}",
                hint="call a class alike in every split; an empty folder stands for no pictures",
            )


def _images_by_split(
    files: Mapping[str, Sequence[LabelledFile]], classes: Sequence[str]
) -> dict[str, Images]:
    """Return the images of all splits; a missing split is taken from another."""
    index = {name: i for i, name in enumerate(classes)}

    def read(split: str) -> FolderImages:
        labels = np.array([index[label] for _, label in files[split]], dtype=np.int64)
        return FolderImages([path for path, _ in files[split]], labels)

    if _UNSPLIT in files:
        images = read(_UNSPLIT)
        validation, test = round(0.1 * len(images)), round(0.2 * len(images))
        train = len(images) - validation - test
        return split_images(images, {"train": train, "validation": validation, "test": test})
    load = split_loader(read, files, "the folder")
    return {split: load(split) for split in SPLITS}
