"""Tasks from a person's own folder of images."""

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
from weightops.tasks.split import cut, three_splits
from weightops.tasks.task import (
    PROMPTS,
    SPLITS,
    Captions,
    Images,
    Task,
    read_lines,
    read_picture,
    read_prompts,
)

PROMPTS_FILE = "prompts.txt"
"""A file in the folder with one prompt a line, ``{}`` for the class, to use instead of the default ones."""

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_LABELLED = re.compile(r"label=(?P<label>.+?)(?:_text=(?P<text>.+?)(?:_\d+)?)?$")

File = tuple[Path, str]
"""A picture and its class."""


@dataclass(frozen=True)
class FolderImages:
    """Pictures in files, opened when they are asked for."""

    files: Sequence[Path]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        path = self.files[index]
        return read_picture(path, str(path))

    @cached_property
    def captions(self) -> Captions | None:
        """The lines of the texts beside the pictures, if all have one.

        Raises:
            TaskError: if only some have, or one is empty or can't be read.
        """
        texts = [path.with_suffix(".txt") for path in self.files]
        missing = [text for text in texts if not text.is_file()]
        if missing and len(missing) < len(texts):
            raise TaskError(
                f"{missing[0]} is missing: {len(texts) - len(missing)} other pictures have captions beside them"
            )
        return None if missing else [read_lines(text) for text in texts]


def folder_task(folder: Path) -> Task:
    """A task from a folder of images.

    ``folder/{train,val,test}/CLASS/*.png``; or without ``val``, which is then a tenth of the training images (at most 5,000, as
    in the papers), or without ``test``, which ``val`` is then; or ``folder/CLASS/*.png``, of which 70 % are for training, 10 % for
    validation and 20 % for the test, in proportion, the same every time; or, in place of folders for classes, names
    ``label=CLASS.png`` or ``label=CLASS_text=WORD_1.png``, as of PAINT's photographs of typographic attacks, where words are
    classes too. Underscores in a class's name are blanks. Folders inside a class's are of that class.

    Args:
        folder: the folder; prompts come from ``prompts.txt`` in it, one a line, with ``{}`` for the class, where there is one.

    Raises:
        TaskError: if it isn't such a folder.
    """
    if not folder.is_dir():
        raise TaskError(
            f"there is no folder {folder}; a task is one of `weightops tasks` or a folder of images in folders by class"
        )
    named: dict[str, Path] = {}
    for path in _folders(folder):
        split = _SPLIT_NAMES.get(path.name.lower())
        if split and (
            _folders(path) or any(path.glob("label=*"))
        ):  # else it is a class of that name
            if split in named:
                raise TaskError(
                    f"{folder} has two folders for {split}: {named[split].name} and {path.name}"
                )
            named[split] = path
    if named and "train" not in named:
        raise TaskError(
            f"{folder} has {' and '.join(named)} and no train: the three are train, val and test"
        )
    if len(named) == 1:
        raise TaskError(
            f"{folder} has train and no test to confirm an edit on: add one, or leave all splits out"
        )
    found = {split: _files(path) for split, path in (named or {"all": folder}).items()}
    classes = _classes(found)
    if len(classes) < 2:
        raise TaskError(
            f"{folder} holds {sum(map(len, found.values()))} images of {len(classes)} classes; expected {folder}/CLASS/*.png with two "
            f"classes at least, {folder}/{{train,val,test}}/CLASS/*.png, or files named label=CLASS_text=WORD.png"
        )
    loads = _splits(found, classes)
    sizes = {split: len(images) for split, images in loads.items()}
    empty = [split for split in SPLITS if not sizes[split]]
    if empty:
        raise TaskError(
            f"{folder} has too few images: none are left for {' and '.join(empty)} ({sizes})"
        )
    name = folder.resolve().name
    prompts = read_prompts(folder / PROMPTS_FILE) if (folder / PROMPTS_FILE).is_file() else PROMPTS
    return Task(
        name, classes, prompts, loads.__getitem__, sizes, f"the folder {folder}", "its owner's"
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


@cache
def _suffixes() -> frozenset[str]:
    Image.init()
    return frozenset(Image.registered_extensions())


def _files(folder: Path) -> list[File]:
    """The images of a split, by name."""

    def images(place: Path) -> list[Path]:
        return sorted(
            p
            for p in place.iterdir()
            if p.is_file() and p.suffix.lower() in _suffixes() and not p.name.startswith(".")
        )

    within = {
        place: [place, *sorted(p for p in place.rglob("*") if p.is_dir())]
        for place in _folders(folder)
    }
    files = [
        (path, place.name.replace("_", " "))
        for place, inner in within.items()
        for p in inner
        for path in images(p)
    ]
    loose = images(folder)
    matches = [(path, _LABELLED.match(path.stem)) for path in loose]
    odd = [path.name for path, match in matches if not match]
    if odd:
        raise TaskError(
            f"{folder} holds {len(odd)} images outside of any class: {first_few(odd)}; put them into folders by class, or name them label=CLASS_text=WORD"
        )
    if files and loose:
        raise TaskError(
            f"{folder} holds images in folders by class and images named label=...: give one of the two"
        )
    return files or [(path, match["label"].replace("_", " ")) for path, match in matches if match]


def _classes(found: Mapping[str, Sequence[File]]) -> tuple[str, ...]:
    """All classes, those that are only written over pictures included."""
    texts = {
        match["text"].replace("_", " ")
        for files in found.values()
        for path, _ in files
        if (match := _LABELLED.match(path.stem)) and match["text"]
    }
    return tuple(sorted({label for files in found.values() for _, label in files} | texts))


def _splits(found: Mapping[str, list[File]], classes: Sequence[str]) -> Mapping[str, Images]:
    """Images by split; what isn't given is cut from what is."""
    place = {name: i for i, name in enumerate(classes)}

    def images(files: Sequence[File]) -> FolderImages:
        return FolderImages(
            [path for path, _ in files],
            np.array([place[label] for _, label in files], dtype=np.int64),
        )

    if "all" in found:
        whole = images(found["all"])
        validation, test = round(0.1 * len(whole)), round(0.2 * len(whole))
        return cut(
            whole, {"train": len(whole) - validation - test, "validation": validation, "test": test}
        )
    load = three_splits(lambda split: images(found[split]), found, "the folder")
    return {split: load(split) for split in SPLITS}
