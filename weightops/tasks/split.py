"""Divide a set of labelled images into splits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache

import numpy as np
import numpy.typing as npt

from weightops.errors import TaskError
from weightops.tasks.task import Images, ImageSubset


def split_indices(
    labels: npt.NDArray[np.int64], sizes: Mapping[str, int]
) -> dict[str, npt.NDArray[np.int64]]:
    """Return disjoint sorted indices for each split, the same in every process.

    Each split has all classes in proportion. Within a class, images are shuffled with a fixed seed.
    Then the position ``(r + 0.5) / n`` of the r-th of n images of each class orders all images, and
    one split after another is taken from the start of that order.

    Args:
        labels: class indices, shape ``(n,)``.
        sizes: the number of images in each split.

    >>> parts = split_indices(np.array([0, 0, 1, 1]), {"train": 2, "test": 2})
    >>> sorted(np.concatenate(list(parts.values())).tolist())
    [0, 1, 2, 3]
    """
    rng = np.random.default_rng(0)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((labels, position))
    ends = np.cumsum(list(sizes.values()))
    return {
        split: np.sort(order[end - size : end])
        for (split, size), end in zip(sizes.items(), ends, strict=True)
    }


def split_images(images: Images, sizes: Mapping[str, int]) -> dict[str, Images]:
    """Return the images of each split: see `split_indices`."""
    return {
        split: ImageSubset(images, indices, images.labels[indices])
        for split, indices in split_indices(images.labels, sizes).items()
    }


def split_loader(
    read: Callable[[str], Images], available: Collection[str], source: str
) -> Callable[[str], Images]:
    """Return a function that loads any split of a data set, which may lack some.

    Without a split for validation, a tenth of the training images (at most 5,000, as in the papers)
    is held out for it. Without a test split, the validation split becomes the test split.

    Args:
        read: reads one of the data set's own splits.
        available: the splits that the data set has, of "train", "validation" and "test".
        source: what errors call the data set.

    Returns:
        A function of a split's name. It keeps the images that it has read, and raises `TaskError`
        for a split that isn't available.
    """
    test = "test" if "test" in available else "validation"

    @cache
    def load(split: str) -> Images:
        own = test if split == "test" else split
        if own in available and (split == "test" or (split, test) == ("validation", "test")):
            return read(own)
        if "train" not in available or split == "test":
            listed = " and ".join(available)
            raise TaskError(f"{source} has no images for {split}, only for {listed}")
        if {"validation", "test"} <= set(available):
            return read("train")
        return divided_training()[split]

    @cache
    def divided_training() -> Mapping[str, Images]:
        images = read("train")
        held_out = min(len(images) // 10, 5000)
        return split_images(images, {"train": len(images) - held_out, "validation": held_out})

    return load
