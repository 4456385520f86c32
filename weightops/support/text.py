"""Texts of messages."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_PATH_IN_A_TEXT = re.compile(r"(?<![^\s(=,:'\"`])(?:/[^\s/,;:()'\"`]+/|~/|\.\./)[^\s,;:()'\"`]*")
"""An absolute path of two parts or more, or one outside of the working folder."""


def first_few(names: Iterable[str], most: int = 3) -> str:
    """Return the first few names, and the number of the others.

    >>> first_few(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def file_name(name: str) -> str:
    """Return a task's name in the form that is used in file names.

    >>> file_name("typographic:mnist")
    'typographic-mnist'
    """
    return name.replace(":", "-")


def counted(count: float, noun: str) -> str:
    """Return a number with its noun, which is in the plural for all numbers but 1.

    >>> counted(1, "point"), counted(0.5, "point"), counted(1200, "image")
    ('1 point', '0.5 points', '1,200 images')
    """
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def decimal(value: float, digits: int) -> str:
    """Return a number with so many decimals; - for none.

    >>> decimal(-0.0004, 3), decimal(float("nan"), 1)
    ('0.000', '-')
    """
    rounded = round(float(value), digits) + 0.0  # -0.0 becomes 0.0
    return "-" if math.isnan(rounded) else f"{rounded:.{digits}f}"


def portable(value: Any) -> Any:
    """Return a path or ref without the folders of this machine, for files that may be shared.

    A path below the working folder is given from there, any other by its last part, also within a
    text. Refs that are no such path are returned unchanged; lists and mappings, with their values
    treated alike.

    >>> portable({"base": "/home/me/models/base", "models": ["org/name", "runs/a"]})
    {'base': 'base', 'models': ['org/name', 'runs/a']}
    >>> portable("the mean of /data/a and /data/b")
    'the mean of a and b'
    """
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, str) and (match := re.fullmatch(r"(\w+:)(/[^/].*)", value)):
        return match[1] + portable(match[2])  # dequantized:/a/model
    if isinstance(value, str) and "+/" in value:
        return "+".join(portable(part) for part in value.split("+"))  # a model and its adapter
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith(("../", "~"))):
        path = Path(os.path.abspath(value))
        inside = path.is_relative_to(Path.cwd())
        return path.relative_to(Path.cwd()).as_posix() if inside else path.name
    if isinstance(value, str):
        return _PATH_IN_A_TEXT.sub(lambda match: portable(match[0]), value)
    return value


def distinct_names(refs: Iterable[str]) -> dict[str, str]:
    """Return ref -> its portable name, with the folder before it where several have one name.

    >>> distinct_names(["/data/run1/final", "/data/run2/final", "/data/pre"])
    {'/data/run1/final': 'run1/final', '/data/run2/final': 'run2/final', '/data/pre': 'pre'}
    """
    names = {ref: str(portable(ref)) for ref in refs}
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {
        ref: "/".join(Path(ref).parts[-2:]) if name in shared and name != ref else name
        for ref, name in names.items()
    }


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Return a value of lists and mappings in which texts have other names."""
    if isinstance(value, Mapping):
        return {key: renamed(item, names) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value
