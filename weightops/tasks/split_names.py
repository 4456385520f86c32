"""Names of splits: those that are understood, and those that look like one and aren't."""

from __future__ import annotations

import re
from collections.abc import Iterable

from weightops.errors import TaskError

_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "devel", "development", "eval"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}

SPLIT_NAMES = tuple(_SPLIT_OF)
"""All names of splits that are understood, in lower case."""

NOT_SCORED = frozenset({"extra", "unlabeled", "unlabelled", "unsupervised"})
"""Names of pictures that come with a data set, and are none of its splits."""

PICTURES = frozenset(
    {"image", "images", "img", "imgs", "jpegimages", "annotations", "labels", "masks", "trimaps"}
)
"""Names of folders, in lower case, that sort files by their kind and not by class."""

NO_PICTURES = frozenset(
    {"annotation", "annotations", "labels", "mask", "masks", "segmentation", "trimaps"}
)
"""Names of folders, in lower case, whose files belong to pictures and are none."""

HINT = "name splits train, val (or valid, validation, dev, eval) and test"

_SPLIT = (
    r"(?:(?:train|val|valid|dev|eval|test)(?:ing|idation|elopment|uation)?(?:set)?"
    r"|hold-?out|held-?out|(?:fold|split)[-_ ]?\d+)"
)
_PART = re.compile(r"(?:^|[^a-z])(?:images?|imgs?|parts?|batch|chunk|shard)[-_ ]?\d+$")
_LIKE_A_SPLIT = re.compile(rf"(?:^|[^a-z]){_SPLIT}(?:$|[^a-z])")
_LISTS_SPLIT = re.compile(
    rf"(?:list[-_])?{_SPLIT}(?:[-_]?(?:list|files|split|images|labels|set|data))?[-_]?\d*"
    r"\.(?:txt|csv|tsv|jsonl?|lst)"
)


def split_of(name: str) -> str | None:
    """Return the split that a name stands for, or None.

    >>> split_of("Training"), split_of("dev"), split_of("cats")
    ('train', 'validation', None)
    """
    return _SPLIT_OF.get(name.lower())


def one_name_each(names: Iterable[str], source: str) -> dict[str, str]:
    """Return split -> its name, of names that stand for splits.

    Raises:
        TaskError: if two names stand for one split.

    >>> one_name_each(["train", "dev"], "photos")
    {'train': 'train', 'validation': 'dev'}
    """
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        split = split_of(name) or name
        if split in found:
            raise TaskError(f"{source} has two splits for {split}: {found[split]} and {name}")
        found[split] = name
    return found


def looks_like_split(name: str) -> bool:
    """Return whether a name seems to mean a split.

    >>> looks_like_split("seg_train"), looks_like_split("trains")
    (True, False)
    """
    return bool(_LIKE_A_SPLIT.search(name.lower()))


def is_part(name: str) -> bool:
    """Return whether a folder's name seems to mean one of several parts of the pictures.

    >>> is_part("HAM10000_images_part_1"), is_part("party 2")
    (True, False)
    """
    return bool(_PART.search(name.lower()))


def lists_split(name: str) -> bool:
    """Return whether a file's name seems to mean a list of the pictures of a split.

    >>> lists_split("train_list.csv"), lists_split("test_results.csv")
    (True, False)
    """
    return bool(_LISTS_SPLIT.fullmatch(name.lower()))
