"""TODO."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from weightops.support.atomic import atomic_output
from weightops.support.json_files import write_json


def cached_folder(kind: str, files: Mapping[str, Any]) -> Path:
    """A folder of the cache, named by its content, with files of these names: bytes as they are, all else as JSON."""
    digest = sha256(kind.encode())
    for name, content in files.items():
        digest.update(f"\0{name}\0".encode())
        digest.update(
            content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
        )
    folder = cache_dir() / kind / digest.hexdigest()[:16]
    if not folder.is_dir():
        with atomic_output(folder, overwrite=True) as part:
            part.mkdir()
            for name, content in files.items():
                if isinstance(content, bytes):
                    (part / name).write_bytes(content)
                else:
                    write_json(part / name, content)
    return folder


def cache_dir() -> Path:
    """Where weightops keeps what it can make again: ``$WEIGHTOPS_CACHE``, or ``weightops`` in the user's cache folder."""
    chosen = os.environ.get("WEIGHTOPS_CACHE")
    return (
        Path(chosen)
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weightops"
    )
