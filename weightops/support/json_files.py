"""JSON files, read and written strictly."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weightops.errors import CheckpointError
from weightops.support.budget import OBJECT, Budget

_UNPRINTABLE = re.compile(r"[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""What JSON leaves as it is, and terminals and browsers act on."""


_DEPTH = 100
"""Levels of lists and objects, of which files in use have ten. How many Python reads depends on its
version, and what walks through them may stand fewer."""

_TOO_DEEP = "it is nested too deep"


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, with NaN as null and keys in their order."""
    path.write_text(json_text(value) + "\n", encoding="utf-8")


def json_text(value: Any) -> str:
    """Return a value as indented JSON, with every character that a terminal obeys escaped."""
    text = json.dumps(jsonable(value), indent=2, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: if the file doesn't hold one.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def parse_json(text: str | bytes) -> Any:
    """Return the value of a text that comes from a file.

    Raises:
        ValueError: if it isn't JSON, repeats a key, is nested very deep, or is made of empty lists
            and objects, which take many times its size.
    """
    begins = (
        (text.count("["), text.count("{"))
        if isinstance(text, str)
        else (text.count(b"["), text.count(b"{"))
    )
    try:
        Budget(len(text)).spend(OBJECT * sum(begins))
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except CheckpointError as error:
        raise ValueError(error.fact) from None
    level = [content]
    for _ in range(_DEPTH):
        level = [item for part in level for item in _items(part)]
        if not level:
            return content
    raise ValueError(_TOO_DEEP)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the JSON object of some pairs.

    Raises:
        ValueError: for a repeated key, from which two programs may read different values.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = next(key for key in counts if counts[key] > 1)
        raise ValueError(f"it repeats the key {repeated[:80]!r}")
    return content


def jsonable(value: Any) -> Any:
    """Return the value with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
