"""Cut one set of labelled images into splits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


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
