"""Find pictures that are in two splits, by the content of their files."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256

from weightops.support.text import first_few
from weightops.tasks.task import Images, encoded_of, encoded_size_of

log = logging.getLogger("weightops")

_HEAD = 4096
"""Bytes that tell nearly all pictures apart."""

Place = tuple[str, int]
"""A split and the index of an image in it."""


def copies_between(parts: Mapping[str, Images]) -> list[tuple[Place, Place]]:
    """Return pictures of a later split that an earlier one has, too, each with the first such.

    Only files of equal size, and with an equal start, are read as a whole.

    Args:
        parts: split -> its images, in the order of the splits.
    """
    places = [(split, i) for split, images in parts.items() for i in range(len(images))]

    def content(place: Place, most: int = -1) -> bytes:
        return encoded_of(parts[place[0]], place[1], most) or b""

    groups: Iterable[list[Place]] = [places]
    for key in (
        lambda place: encoded_size_of(parts[place[0]], place[1]),
        lambda place: content(place, _HEAD),
        lambda place: sha256(content(place)).digest(),
    ):
        groups = [finer for group in groups for finer in _across_splits(group, key)]
    return [(place, first) for first, *others in groups for place in others if place[0] != first[0]]


def _across_splits(
    places: Iterable[Place], key: Callable[[Place], object]
) -> Iterator[list[Place]]:
    """Yield the groups of places with an equal key that are in more than one split."""
    groups = defaultdict(list)
    for place in places:
        groups[key(place)].append(place)
    for value, group in groups.items():
        if value is not None and len({split for split, _ in group}) > 1:
            yield group


def warn_of_copies(parts: Mapping[str, Images], source: str) -> int:
    """Warn of pictures that are in two splits, and return their number."""
    pairs = copies_between(parts)
    if pairs:
        shown = first_few(f"{a} {i} = {b} {j}" for (a, i), (b, j) in pairs)
        log.warning(
            "%s has %d pictures in two splits, so its accuracies are too high: image %s",
            source,
            len(pairs),
            shown,
        )
    return len(pairs)


def compared(read: Callable[[str], Images], source: str) -> Callable[[str], Images]:
    """Return a function that reads a split, and warns of pictures that one read before has, too."""
    known: dict[str, Images] = {}

    def read_and_compare(split: str) -> Images:
        images = read(split)
        for other, earlier in known.items():
            warn_of_copies({other: earlier, split: images}, source)
        known[split] = images
        return images

    return read_and_compare
