"""Cut one set of labelled images into splits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache

import numpy as np
import numpy.typing as npt

from weightops.errors import TaskError
from weightops.tasks.task import Images, SomeImages


def split_indices(
    labels: npt.NDArray[np.int64], sizes: Mapping[str, int]
) -> dict[str, npt.NDArray[np.int64]]:
    """Disjoint indices of the given numbers, classes in proportion, the same every time.

    Within each class the order is shuffled with a fixed seed; then position ``(r + 0.5) / n`` of the
    class's r-th image orders all images, and the splits are cut from that order in turn.
    """
    rng = np.random.default_rng(0)
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((labels, place))
    ends = np.cumsum(list(sizes.values()))
    return {
        split: np.sort(order[end - size : end])
        for (split, size), end in zip(sizes.items(), ends, strict=True)
    }


def cut(images: Images, sizes: Mapping[str, int]) -> dict[str, Images]:
    """The images of each part; see `split_indices`."""
    parts = split_indices(images.labels, sizes)
    return {
        split: SomeImages(images, indices, images.labels[indices])
        for split, indices in parts.items()
    }


def held_out(images: Images) -> dict[str, Images]:
    """Training images in two: a tenth of them, at most 5,000, are for validation, as in the papers."""
    validation = min(len(images) // 10, 5000)
    return cut(images, {"train": len(images) - validation, "validation": validation})


def three_splits(
    read: Callable[[str], Images], have: Collection[str], source: str
) -> Callable[[str], Images]:
    """The images of a split, from those that a data set has.

    Without one for validation, part of the training images is for it; without one for the test, the validation split is the test.

    Args:
        read: gives the images of one of the set's own splits.
        have: these splits, of "train", "validation" and "test".
        source: what the set is called in messages.

    Returns:
        A function of a split's name, which keeps what it has read, and raises `TaskError` for a split that can't be had.
    """
    test = "test" if "test" in have else "validation"

    @cache
    def load(split: str) -> Images:
        own = test if split == "test" else split
        if own in have and (split == "test" or (split, test) == ("validation", "test")):
            return read(own)
        if "train" not in have or split == "test":
            raise TaskError(f"{source} has no images for {split}, only for {' and '.join(have)}")
        return read("train") if {"validation", "test"} <= set(have) else training()[split]

    @cache
    def training() -> Mapping[str, Images]:
        return held_out(read("train"))

    return load
