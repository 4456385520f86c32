"""Cut one set of labelled images into splits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from weightops.tasks.task import Images, SomeImages


def split_indices(labels: npt.NDArray[np.int64], sizes: Mapping[str, int]) -> dict[str, npt.NDArray[np.int64]]:
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
    return {split: np.sort(order[end - size : end]) for (split, size), end in zip(sizes.items(), ends, strict=True)}


def cut(images: Images, sizes: Mapping[str, int]) -> dict[str, Images]:
    """The images of each part; see `split_indices`."""
    parts = split_indices(images.labels, sizes)
    return {split: SomeImages(images, indices, images.labels[indices]) for split, indices in parts.items()}


def held_out(images: Images) -> dict[str, Images]:
    """Training images in two: a tenth of them, at most 5,000, are for validation, as in the papers."""
    validation = min(len(images) // 10, 5000)
    return cut(images, {"train": len(images) - validation, "validation": validation})
