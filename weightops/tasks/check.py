"""Check a task before anything is trained on it: decode every picture once, in parallel."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from weightops.errors import TaskError
from weightops.support.progress import tracked
from weightops.support.text import first_few
from weightops.tasks.copies import copies_between
from weightops.tasks.task import SPLITS, Images, ImageSubset, LazySizes, Task, unreadable_in

log = logging.getLogger("weightops")


@dataclass(frozen=True)
class TaskCheck:
    """The facts about a task's pictures.

    Attributes:
        counts: split -> number of pictures of each class, in the order of the classes.
        faults: split -> index of a picture that can't be read -> why.
        copies: pictures that are in two splits, each with the first: ``(split, index)`` twice.
    """

    counts: dict[str, list[int]]
    faults: dict[str, dict[int, str]]
    copies: list[tuple[tuple[str, int], tuple[str, int]]]

    @property
    def sound(self) -> bool:
        """Whether every picture can be read."""
        return not any(self.faults.values())


def check_task(task: Task) -> TaskCheck:
    """Decode every picture of a task once, count classes, and look for copies between splits.

    >>> from weightops import TASKS
    >>> check_task(TASKS["digits"]).sound
    True
    """
    parts = {split: task.load(split) for split in SPLITS}
    counts = {
        split: np.bincount(images.labels, minlength=len(task.classes)).tolist()
        for split, images in parts.items()
    }
    faults = {split: faults_of(images, f"{task.name} {split}") for split, images in parts.items()}
    return TaskCheck(counts, faults, copies_between(parts))


def faults_of(images: Images, title: str) -> dict[int, str]:
    """Return why images can't be read, by index; empty if all can."""

    def fault(index: int) -> str | None:
        try:
            images[index]
        except TaskError as error:
            return error.fact
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(fault, range(len(images)))
        bar = tracked(found, title, "images", len(images))
        return {i: text for i, text in enumerate(bar) if text is not None}


def refuse_faults(faults: Mapping[int, str], count: int, title: str) -> None:
    """Refuse pictures that can't be read.

    Args:
        faults: index of a picture -> why.
        count: the number of all pictures.
        title: what they are called.

    Raises:
        TaskError: naming the first of them, and their number.
    """
    if faults:
        raise TaskError(
            f"{len(faults)} of {count} pictures of {title} can't be read: "
            f"{first_few(faults.values())}",
            hint="`weightops tasks check` lists all of them; readable:TASK (on the command line "
            "--skip-unreadable) leaves them out",
        )


@dataclass(frozen=True)
class ReadableImages(ImageSubset):
    """The images of a split that can be read.

    Attributes:
        left_out: the number of the others.
    """

    left_out: int

    @property
    def unreadable(self) -> int:
        """The number of pictures that were left out."""
        return self.left_out + unreadable_in(self.images)


def without_unreadable(task: Task) -> Task:
    """Return a task without the pictures that can't be read, which results count."""

    @cache
    def load(split: str) -> ReadableImages:
        images = task.load(split)
        faults = faults_of(images, f"{task.name} {split}")
        if faults:
            log.warning(
                "%d pictures of %s %s are left out, which can't be read: %s",
                len(faults),
                task.name,
                split,
                first_few(faults.values()),
            )
        good = np.array([i for i in range(len(images)) if i not in faults], dtype=np.int64)
        return ReadableImages(images, good, images.labels[good], len(faults))

    source = f"{task.source}, without pictures that can't be read"
    return replace(task, load=load, sizes=LazySizes(load), source=source)
