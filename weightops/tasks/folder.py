"""Tasks from a folder of images."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.support.text import first_few, portable
from weightops.tasks.annotations import annotated_files, annotations_of, spoken_names
from weightops.tasks.class_folders import LabelledFile, check_inner_folders, check_tables
from weightops.tasks.class_names import in_words
from weightops.tasks.copies import warn_of_copies
from weightops.tasks.pictures import image_files, places, read_image, subfolders
from weightops.tasks.split import split_images, split_loader
from weightops.tasks.split_folders import is_captioned, split_folders
from weightops.tasks.split_names import PICTURES, is_part
from weightops.tasks.task import (
    PROMPTS,
    SPLITS,
    Captions,
    Images,
    Task,
    digest_of_files,
    read_lines,
    read_prompts,
)

log = logging.getLogger("weightops")

PROMPTS_FILE = "prompts.txt"
"""A file in the folder with one prompt a line, ``{}`` for the class, for the default prompts."""

_UNSPLIT = "all"
_LABELLED = re.compile(r"label=(?P<label>.+?)(?:_text=(?P<text>.+?)(?:_\d+)?)?$")

_CAPTIONED = ""
"""The class of pictures that have captions in place of classes."""


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

    def digest(self) -> str:
        """Return what tells the images from all others."""
        return digest_of_files(self.files, "upright")

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
    * Pictures with a text file beside each, ``1.png`` and ``1.txt``, in place of folders for the
      classes: its lines are captions. Such a task has no classes, and is for retrieval.
    * That of Tiny-ImageNet: the pictures of a split in its folder ``images``, and their classes in
      ``val_annotations.txt`` beside it. A test split without classes is left out with a warning.
      ``words.txt`` names the classes.

    Classes are in the order of their folders' names, as in torchvision's ``ImageFolder``. In
    prompts, underscores become blanks. Folders inside the folder of a class belong to that class,
    but for hidden ones and thumbnails; splits and masks in there are refused. So is a table, such
    as ``metadata.csv``, that lists the pictures with other classes than their folders.

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
    folders = split_folders(folder) or {_UNSPLIT: folder}
    files = {split: _labelled_files(path) for split, path in folders.items()}
    _leave_out_unlabelled(files, folders)
    _check_every_class(files, folders)
    for place, labelled in {
        **{folders[split]: own for split, own in files.items()},
        folder: [file for own in files.values() for file in own],
    }.items():
        check_tables(place, labelled)
    classes = _class_names(files)
    _check_classes(classes, folder)
    if len(classes) < 2 and classes != (_CAPTIONED,):
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

    name, source = folder.resolve().name, f"the folder {portable(str(folder))}"
    classes = () if classes == (_CAPTIONED,) else classes
    named = spoken_names(folder, classes)
    spoken = tuple(named.get(name) or in_words(name) for name in classes)
    return Task(name, spoken, prompts, load, sizes, source, "its owner's", classes)


def _labelled_files(folder: Path) -> list[LabelledFile]:
    """Return the images of a split, by name, with their classes."""
    annotations = annotations_of(folder)
    if annotations is not None:
        pictures = [path for place in places(folder) for path in image_files(place)]
        return annotated_files(annotations, pictures)
    by_folder: list[LabelledFile] = []
    class_folders = subfolders(folder)
    check_inner_folders(class_folders)
    for class_folder in class_folders:
        files = [path for place in places(class_folder) for path in image_files(place)]
        by_folder += [(path, class_folder.name) for path in files]
    matches = {path: _LABELLED.match(path.stem) for path in image_files(folder)}
    unlabelled = [path.name for path, match in matches.items() if not match]
    if unlabelled and not by_folder and is_captioned(folder):
        return [(path, _CAPTIONED) for path in matches]
    if unlabelled:
        raise TaskError(
            f"{folder} holds {len(unlabelled)} images outside of any class: "
            f"{first_few(unlabelled)}",
            hint="put them into folders by class, name them label=CLASS_text=WORD, or put a text "
            "file of captions beside each",
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
    spoken = [" ".join(in_words(name).split()) for name in names]
    twice = [name for name, said in zip(names, spoken, strict=True) if spoken.count(said) > 1]
    if twice:
        shown = first_few(map(repr, twice))
        raise TaskError(f"two classes have one name but for underscores and blanks: {shown}")
    return tuple(names)


def _leave_out_unlabelled(
    files: dict[str, list[LabelledFile]], folders: Mapping[str, Path]
) -> None:
    """Leave out a test split whose pictures are all in a folder ``images``: it has no classes."""
    labels = {split: {label.lower() for _, label in labelled} for split, labelled in files.items()}
    others = set().union(*(names for split, names in labels.items() if split != "test"))
    if len(files) > 2 and len(labels.get("test", ())) == 1 and labels["test"] <= PICTURES - others:
        log.warning("%s has no classes: its pictures aren't used", folders["test"])
        del files["test"]


def _check_classes(classes: Sequence[str], folder: Path) -> None:
    """Refuse folders of pictures, masks and the like in place of folders of classes."""
    if _CAPTIONED in classes[:-1]:
        raise TaskError(f"{folder} has splits with captions in place of classes, and others with")
    spelt = {name.lower() for name in classes}
    if len(classes) > 1 and (spelt <= PICTURES or all(map(is_part, spelt))):
        raise TaskError(
            f"{folder} has {first_few(classes)}, which seem to be no classes",
            hint="name the folder that holds the folders of the classes",
        )


def _check_every_class(
    files: Mapping[str, Sequence[LabelledFile]], folders: Mapping[str, Path]
) -> None:
    """Refuse a class that only one of several splits has; an empty folder is enough to have it."""
    present = {
        split: {label for _, label in labelled} | {p.name for p in subfolders(folders[split])}
        for split, labelled in files.items()
    }
    for split, labelled in files.items():
        elsewhere = set().union(*(names for other, names in present.items() if other != split))
        alone = sorted({label for _, label in labelled} - elsewhere)
        if alone and len(files) > 1:
            raise TaskError(
                f"{first_few(alone)}: only {folders[split]} has this class, not "
                f"{' and '.join(str(folders[other]) for other in files if other != split)}",
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
