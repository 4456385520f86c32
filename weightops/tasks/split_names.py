"""Names of splits: those that are understood, and those that look like one and aren't."""

from __future__ import annotations

import re

_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "devel", "development", "eval"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}

NOT_SCORED = frozenset({"extra", "unlabeled", "unlabelled", "unsupervised"})
"""Names of pictures that come with a data set, and are none of its splits."""

HINT = "name splits train, val (or valid, validation, dev, eval) and test"

_LIKE_A_SPLIT = re.compile(
    r"(?:^|[^a-z])(?:train|val|valid|dev|test)(?:ing|idation|elopment|set)?(?:$|[^a-z])"
)


def split_of(name: str) -> str | None:
    """Return the split that a name stands for, or None.

    >>> split_of("Training"), split_of("dev"), split_of("cats")
    ('train', 'validation', None)
    """
    return _SPLIT_OF.get(name.lower())


def looks_like_split(name: str) -> bool:
    """Return whether a name seems to mean a split.

    >>> looks_like_split("seg_train"), looks_like_split("trains")
    (True, False)
    """
    return bool(_LIKE_A_SPLIT.search(name.lower()))
