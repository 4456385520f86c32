"""Tasks derived from others: words over their images, some of their classes, several joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.tasks.check import without_unreadable
from weightops.tasks.seeds import seed
from weightops.tasks.task import (
    SPLITS,
    AlteredImages,
    Captions,
    Images,
    ImageSubset,
    LazySizes,
    Task,
    captions_of,
    digest_of,
    encoded_of,
    encoded_size_of,
    unreadable_in,
)
from weightops.tasks.texts import TextTask, joined_texts
from weightops.tasks.written_words import write_beside, write_word

NEUTRAL = [
    "hello",
    "sale",
    "music",
    "garden",
    "winter",
    "paper",
    "north",
    "seven",
    "metro",
    "story",
]
"""Words that name no class of a built-in task, and hide as much of an image as an attack."""


@dataclass(frozen=True)
class WrittenImages(AlteredImages):
    """Images with a word over each, in a random font, size, colour and place; always the same one.

    Attributes:
        images: the images without words.
        task: the task of the images.
        split: the split of the images, which determines the fonts.
        words: returns the words that may be written over an image of a class.
        kind: part of the seed.
        write: writes a word, in a font of a split.
    """

    task: Task
    split: str
    words: Callable[[int], Sequence[str]]
    kind: str
    write: Callable[[Image.Image, str, np.random.Generator, str], Image.Image] = write_word

    def __getitem__(self, index: int) -> Image.Image:
        rng = np.random.default_rng(seed(self.kind, self.task.name, self.split, index))
        words = self.words(int(self.labels[index]))
        word = words[int(rng.integers(len(words)))]
        return self.write(self.images[index], word, rng, self.split)


def typographic(task: Task, *, beside: bool = False) -> Task:
    """Return a task under typographic attack (arXiv 2208.05592).

    The name of a wrong class is written over each image.

    Raises:
        TaskError: if the task has fewer than two classes.
    """
    if len(task.classes) < 2:
        raise TaskError(
            f"{task.name} has no two classes, so there is no wrong one to write over an image"
        )

    def wrong(label: int) -> Sequence[str]:
        return [name for i, name in enumerate(task.classes) if i != label]

    source = f"{task.source}, with the names of wrong classes written over it"
    return _with_words(task, "typographic", wrong, source, beside)


def typographic_beside(task: Task) -> Task:
    """Return a task with the name of a wrong class beside each image, which hides nothing of it."""
    return typographic(task, beside=True)


def neutral_beside(task: Task) -> Task:
    """Return a task with words beside its images that name none of its classes."""
    return neutral(task, beside=True)


def neutral(task: Task, *, beside: bool = False) -> Task:
    """Return a task with words over its images that name none of its classes.

    They hide as much of an image as `typographic` does, but don't mislead.
    """
    words = [word for word in NEUTRAL if word not in task.classes]
    source = f"{task.source}, with words written over it that name no class"
    return _with_words(task, "neutral", lambda _: words, source, beside)


def _with_words(
    task: Task, kind: str, words: Callable[[int], Sequence[str]], source: str, beside: bool
) -> Task:
    if beside:
        kind, source = f"{kind}-beside", source.replace("over it", "beside it")

    def load(split: str) -> WrittenImages:
        written = WrittenImages(task.load(split), task, split, words, kind)
        return replace(written, write=write_beside) if beside else written

    return replace(task, name=f"{kind}:{task.name}", load=load, source=source)


def with_classes(task: Task, classes: Sequence[str], name: str) -> Task:
    """Return a task with some of the classes of another, and the images of these.

    Args:
        task: the other task.
        classes: the names of the classes to keep.
        name: the name of the new task.

    Raises:
        TaskError: if the task lacks one of the classes, or none is named.
    """
    missing = [c for c in classes if c not in task.classes]
    if missing or not classes:
        raise TaskError(
            f"{task.name} has no class {', '.join(missing) or 'to be left with'}; "
            f"it has {', '.join(task.classes)}"
        )
    kept = sorted(task.classes.index(c) for c in classes)

    def load(split: str) -> ImageSubset:
        images = task.load(split)
        indices = np.flatnonzero(np.isin(images.labels, kept))
        return ImageSubset(images, indices, np.searchsorted(kept, images.labels[indices]))

    names = tuple(task.classes[i] for i in kept)
    raw = tuple(task.raw_classes[i] for i in kept) if task.raw_classes else ()
    sizes = LazySizes(load)
    return replace(task, name=name, classes=names, raw_classes=raw, load=load, sizes=sizes)


def first_half(task: Task) -> Task:
    """Return a task with the first half of the classes."""
    return with_classes(task, task.classes[: len(task.classes) // 2], f"first-half:{task.name}")


def second_half(task: Task) -> Task:
    """Return a task with the second half of the classes."""
    return with_classes(task, task.classes[len(task.classes) // 2 :], f"second-half:{task.name}")


DERIVED: dict[str, Callable[[Task], Task]] = {
    "typographic": typographic,
    "neutral": neutral,
    "typographic-beside": typographic_beside,
    "neutral-beside": neutral_beside,
    "first-half": first_half,
    "second-half": second_half,
    "readable": without_unreadable,
}
"""The words that derive a task when written before its name and a colon."""


@dataclass(frozen=True, eq=False)
class UnionTask(Task):
    """Several tasks as one, with all their images and classes.

    Classes with the same prompts are one class.
    """

    tasks: tuple[Task, ...] = ()

    @cached_property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        return tuple(dict.fromkeys(prompts for task in self.tasks for prompts in task.prompts))


@dataclass(frozen=True)
class UnionImages:
    """The images of several tasks, one after another."""

    parts: Sequence[Images]
    labels: npt.NDArray[np.int64]

    @property
    def captions(self) -> Captions | None:
        """The captions of all images, or None if the images of a task have none."""
        parts = [captions_of(images) for images in self.parts]
        if None in parts:
            return None
        return [texts for captions in parts for texts in captions or ()]

    @property
    def unreadable(self) -> int:
        """The number of pictures that were left out, as they can't be read."""
        return sum(map(unreadable_in, self.parts))

    def digest(self) -> str | None:
        """Return what tells the images from others, or None if some are in no files."""
        parts = list(map(digest_of, self.parts))
        return None if None in parts else " ".join(part or "" for part in parts)

    def encoded(self, index: int, most: int = -1) -> bytes | None:
        """Return the content of the file of an image, or None if it is in no file."""
        images, place = self._find(index)
        return encoded_of(images, place, most)

    def encoded_size(self, index: int) -> int | None:
        """Return the size of the file of an image, or None if it is in no file."""
        return encoded_size_of(*self._find(index))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        images, place = self._find(index)
        return images[place]

    def _find(self, index: int) -> tuple[Images, int]:
        """Return the part that has an image, and the index in it."""
        for images in self.parts:
            if index < len(images):
                return images, index
            index -= len(images)
        raise IndexError(index)


def parts_of(task: Task) -> tuple[Task, ...]:
    """Return the tasks that a task is the union of; none for any other."""
    return task.tasks if isinstance(task, UnionTask) else ()


def union(tasks: Sequence[Task]) -> Task:
    """Return several tasks, or several texts, as one; a single task is returned as it is.

    Classes with the same prompts are one class, called as in the first task that has it.
    """
    if len(tasks) == 1:
        return tasks[0]
    texts = [task for task in tasks if isinstance(task, TextTask)]
    if len(texts) == len(tasks):
        return joined_texts(texts)
    names = {
        prompts: name
        for task in reversed(tasks)
        for prompts, name in zip(task.prompts, task.classes, strict=True)
    }

    def load(split: str) -> UnionImages:
        index = {prompts: i for i, prompts in enumerate(joint.prompts)}
        parts = [task.load(split) for task in tasks]
        labels = [
            np.array([index[prompts] for prompts in task.prompts], dtype=np.int64)[images.labels]
            for task, images in zip(tasks, parts, strict=True)
        ]
        return UnionImages(parts, np.concatenate(labels))

    joint = UnionTask(
        name="+".join(task.name for task in tasks),
        classes=(),
        templates=tuple(dict.fromkeys(template for task in tasks for template in task.templates)),
        load=load,
        sizes={split: sum(task.sizes[split] for task in tasks) for split in SPLITS},
        source="; ".join(dict.fromkeys(task.source for task in tasks)),
        license="; ".join(dict.fromkeys(task.license for task in tasks)),
        upright=all(task.upright for task in tasks),
        tasks=tuple(tasks),
    )
    return replace(joint, classes=tuple(names[prompts] for prompts in joint.prompts))
