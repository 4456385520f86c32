"""TODO."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from weightops.errors import CheckpointError


def write_json(path: Path, value: Any) -> None:
    """JSON for people and machines: indented, NaN as null, keys in their order."""
    path.write_text(
        json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: of repeated ones, two readers may see different values.

    Raises:
        ValueError: naming a key that isn't.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it repeats the key {key[:80]!r}")
        found[key] = value
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if it isn't one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def jsonable(value: Any) -> Any:
    """The value with NaN and infinities, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
