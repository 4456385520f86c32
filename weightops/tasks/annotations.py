"""Files beside pictures that say their classes: those of Tiny-ImageNet's layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weightops.errors import TaskError
from weightops.support.text import first_few
from weightops.tasks.task import read_lines

WORDS_FILE = "words.txt"
"""A file in the folder of a task with the names of its classes: ``CLASS<tab>NAME, SYNONYM``."""

_SUFFIX = "_annotations.txt"


def annotations_of(folder: Path) -> Path | None:
    """Return the file in a split's folder that says the class of each picture, if there is one."""
    return next(iter(sorted(folder.glob(f"*{_SUFFIX}"))), None)


def annotated_files(annotations: Path, files: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return pictures with the classes that a file gives them: ``FILE<tab>CLASS`` in each line.

    Args:
        annotations: the file.
        files: the pictures of the split.

    Raises:
        TaskError: if a line is of another form, or there are lines without pictures or pictures
            without lines.
    """
    classes: dict[str, str] = {}
    for line in read_lines(annotations):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not label or classes.get(name, label) != label:
            raise TaskError(f"{annotations} has a line that isn't FILE<tab>CLASS: {line[:60]!r}")
        classes[name] = label
    names = [path.name for path in files]
    unlike = sorted(classes.keys() ^ set(names))
    if unlike:
        raise TaskError(
            f"{annotations} and the pictures beside it don't match: {first_few(unlike)}",
            hint="every picture needs a line, and every line a picture",
        )
    return [(path, classes[path.name]) for path in files]


def spoken_names(folder: Path, classes: Sequence[str]) -> dict[str, str]:
    """Return class -> its first name in `WORDS_FILE`; all names where another class has the first.

    Returns:
        Nothing if there is no such file, or it lacks a class.
    """
    path = folder / WORDS_FILE
    if not path.is_file():
        return {}
    lines = [line.partition("\t") for line in read_lines(path)]
    words = {key: names.strip() for key, _, names in lines if names.strip()}
    if not words.keys() >= set(classes):
        return {}
    first = {name: words[name].partition(",")[0] for name in classes}
    alone = list(first.values())
    return {n: words[n] if alone.count(short) > 1 else short for n, short in first.items()}
