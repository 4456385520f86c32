"""Tasks from a folder of images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.support.text import first_few
from weightops.tasks.split import split_images, split_loader
from weightops.tasks.task import (
    PROMPTS,
    SPLITS,
    Captions,
    Images,
    Task,
    read_image,
    read_lines,
    read_prompts,
)

PROMPTS_FILE = "prompts.txt"
"""A file in the folder with one prompt a line, ``{}`` for the class, for the default prompts."""

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
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

    * ``{train,val,test}/CLASS/*.png``. Without ``val``, a tenth of the training images (at most
      5,000) is for validation. Without ``test``, ``val`` is the test split.
    * ``CLASS/*.png``: 70 % of the images are for training, 10 % for validation, 20 % for the test,
      classes in proportion, the same in every process.
    * Either of these with files called ``label=CLASS.png`` or ``label=CLASS_text=WORD_1.png`` in
      place of folders for the classes, as PAINT's photographs of typographic attacks are called.
      The words are classes, too.

    Underscores in the name of a class become blanks. Folders inside the folder of a class belong
    to that class.

    Args:
        folder: the folder. If it holds ``prompts.txt``, its lines are the prompts, with ``{}`` for
            the class.

    Raises:
        TaskError: if the folder has another layout, or too few images.
    """
    if not folder.is_dir():
        raise TaskError(
            f"there is no folder {folder}",
            hint="a task is one of `weightops tasks` or a folder of images in folders by class",
        )
    split_folders = _split_folders(folder) or {_UNSPLIT: folder}
    files = {split: _labelled_files(path) for split, path in split_folders.items()}
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
    name, source = folder.resolve().name, f"the folder {folder}"
    return Task(name, classes, prompts, images.__getitem__, sizes, source, "its owner's")


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the splits by split; none if the folder isn't divided into splits."""
    folders: dict[str, Path] = {}
    for path in _subfolders(folder):
        split = _SPLIT_NAMES.get(path.name.lower())
        if split is None or not (_subfolders(path) or any(path.glob("label=*"))):
            continue  # a class, though it may be called like a split
        if split in folders:
            names = f"{folders[split].name} and {path.name}"
            raise TaskError(f"{folder} has two folders for {split}: {names}")
        folders[split] = path
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
    return folders


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


@cache
def _image_suffixes() -> frozenset[str]:
    Image.init()
    return frozenset(Image.registered_extensions())


def _image_files(folder: Path) -> list[Path]:
    """Return the images directly in a folder, by name."""
    return sorted(
        p
        for p in folder.iterdir()
        if p.is_file() and p.suffix.lower() in _image_suffixes() and not p.name.startswith(".")
    )


def _labelled_files(folder: Path) -> list[LabelledFile]:
    """Return the images of a split, by name, with their classes."""
    by_folder: list[LabelledFile] = []
    for class_folder in _subfolders(folder):
        inner = sorted(p for p in class_folder.rglob("*") if p.is_dir())
        label = class_folder.name.replace("_", " ")
        for place in (class_folder, *inner):
            by_folder += [(path, label) for path in _image_files(place)]
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
    by_name = [(p, match["label"].replace("_", " ")) for p, match in matches.items() if match]
    return by_folder or by_name


def _class_names(files: Mapping[str, Sequence[LabelledFile]]) -> tuple[str, ...]:
    """Return all classes, with those that are only written over images."""
    labelled = [file for split_files in files.values() for file in split_files]
    labels = {label for _, label in labelled}
    matches = [_LABELLED.match(path.stem) for path, _ in labelled]
    words = {match["text"].replace("_", " ") for match in matches if match and match["text"]}
    return tuple(sorted(labels | words))


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
