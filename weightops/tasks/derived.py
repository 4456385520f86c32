"""Tasks made from other tasks: with words written over their pictures, with some of their classes, or several in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.tasks import drawing
from weightops.tasks.rendered import any_face
from weightops.tasks.seeds import seed
from weightops.tasks.task import Altered, Captions, Images, Sizes, SomeImages, Task, captions_of

NEUTRAL = (
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
)
"""Words that are no class of the tasks that come with weightops: they hide as much of a picture as an attack does."""


@dataclass(frozen=True)
class WrittenImages(Altered):
    """Pictures with a word over each, in a random font, size, colour and place; the same word each time.

    Attributes:
        images: the pictures.
        task: whose they are.
        split: which of its splits, and so which fonts.
        words: gives the words that may be written over a picture of a class.
        kind: part of the seed.
    """

    task: Task
    split: str
    words: Callable[[int], Sequence[str]]
    kind: str

    def __getitem__(self, index: int) -> Image.Image:
        rng = np.random.default_rng(seed(self.kind, self.task.name, self.split, index))
        words = self.words(int(self.labels[index]))
        return written(self.images[index], words[int(rng.integers(len(words)))], rng, self.split)


def written(image: Image.Image, word: str, rng: np.random.Generator, split: str) -> Image.Image:
    """A picture with a word written over it."""
    mask = drawing.text_mask(rng, word, any_face(rng, split), scale=rng.uniform(0.65, 0.95))
    rows = np.flatnonzero(mask.max(1) > 0)
    if len(rows):
        mask = np.roll(mask, int(rng.integers(-rows[0], len(mask) - rows[-1])), axis=0)
    width, height = image.size
    stretched = Image.fromarray((255 * mask).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    names = list(drawing.COLORS)
    ink = drawing.color(rng, names[rng.integers(len(names))])
    paper = np.asarray(image.convert("RGB"), dtype=np.float32)
    cover = np.asarray(stretched, dtype=np.float32)[..., None] / 255
    place = cover[..., 0] > 0.5
    if place.any() and np.linalg.norm(ink - paper[place].mean(0)) < 110:  # it must be readable
        ink = np.where(paper[place].mean() > 128, 10, 245) * np.ones(3, dtype=np.float32)
    return Image.fromarray(np.clip(paper + cover * (ink - paper), 0, 255).astype(np.uint8))


def typographic(task: Task) -> Task:
    """A task under typographic attack: the name of a wrong class is written over each picture (arXiv 2208.05592).

    Raises:
        TaskError: if it has no two classes.
    """
    if len(task.classes) < 2:
        raise TaskError(
            f"{task.name} has no two classes, so there is no wrong one to write over a picture"
        )

    def wrong(label: int) -> Sequence[str]:
        return [name for i, name in enumerate(task.classes) if i != label]

    return _written(task, "typographic", wrong, "with the names of wrong classes written over it")


def neutral(task: Task) -> Task:
    """A task with words over its pictures that name none of its classes: what an attack hides, without its lie."""
    words = [word for word in NEUTRAL if word not in task.classes]
    return _written(
        task, "neutral", lambda _: words, "with words written over it that name no class"
    )


def _written(task: Task, kind: str, words: Callable[[int], Sequence[str]], how: str) -> Task:
    def load(split: str) -> WrittenImages:
        return WrittenImages(task.load(split), task, split, words, kind)

    return replace(task, name=f"{kind}:{task.name}", load=load, source=f"{task.source}, {how}")


def part_of(task: Task, classes: Sequence[str], name: str) -> Task:
    """A task with some of its classes only, and the pictures of these.

    Args:
        task: the task.
        classes: those that stay.
        name: what it is called.

    Raises:
        TaskError: if it has no such class.
    """
    missing = [c for c in classes if c not in task.classes]
    if missing or not classes:
        raise TaskError(
            f"{task.name} has no class {', '.join(missing) or 'to be left with'}; it has {', '.join(task.classes)}"
        )
    places = sorted(task.classes.index(c) for c in classes)

    def load(split: str) -> SomeImages:
        images = task.load(split)
        indices = np.flatnonzero(np.isin(images.labels, places))
        return SomeImages(images, indices, np.searchsorted(places, images.labels[indices]))

    return replace(
        task,
        name=name,
        classes=tuple(task.classes[i] for i in places),
        load=load,
        sizes=Sizes(load),
    )


def first_half(task: Task) -> Task:
    """The first half of a task's classes."""
    return part_of(task, task.classes[: len(task.classes) // 2], f"first-half:{task.name}")


def second_half(task: Task) -> Task:
    """The second half of a task's classes."""
    return part_of(task, task.classes[len(task.classes) // 2 :], f"second-half:{task.name}")


DERIVED: dict[str, Callable[[Task], Task]] = {
    "typographic": typographic,
    "neutral": neutral,
    "first-half": first_half,
    "second-half": second_half,
}
"""What can be written before a task's name and a colon."""


@dataclass(frozen=True, eq=False)
class Union(Task):
    """Several tasks as one: all their pictures, and all their classes; classes with the same prompts are one class."""

    parts: tuple[Task, ...] = ()

    @cached_property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        return tuple(dict.fromkeys(prompts for part in self.parts for prompts in part.prompts))


@dataclass(frozen=True)
class UnionImages:
    """The pictures of several tasks, one after another."""

    parts: Sequence[Images]
    labels: npt.NDArray[np.int64]

    @property
    def captions(self) -> Captions | None:
        """Those of the images, where all have any."""
        several = [captions_of(part) for part in self.parts]
        return (
            None if None in several else [texts for captions in several for texts in captions or ()]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def union(tasks: Sequence[Task]) -> Task:
    """Several tasks as one; a single one as it is."""
    if len(tasks) == 1:
        return tasks[0]

    def load(split: str) -> UnionImages:
        place = {prompts: i for i, prompts in enumerate(joint.prompts)}
        parts = [task.load(split) for task in tasks]
        labels = [
            np.array([place[p] for p in task.prompts], dtype=np.int64)[images.labels]
            for task, images in zip(tasks, parts, strict=True)
        ]
        return UnionImages(parts, np.concatenate(labels))

    classes = {
        prompts: name
        for task in reversed(tasks)
        for prompts, name in zip(task.prompts, task.classes, strict=True)
    }
    sizes = {
        split: sum(task.sizes[split] for task in tasks) for split in ("train", "validation", "test")
    }
    templates = tuple(dict.fromkeys(template for task in tasks for template in task.templates))
    source, license = (
        "; ".join(dict.fromkeys(texts))
        for texts in ((t.source for t in tasks), (t.license for t in tasks))
    )
    joint = Union(
        "+".join(t.name for t in tasks), (), templates, load, sizes, source, license, tuple(tasks)
    )
    return replace(joint, classes=tuple(classes[prompts] for prompts in joint.prompts))
