"""The cache: files that weightops can compute again."""

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
    """Return a folder of the cache that holds these files; its name is a digest of their content.

    Args:
        kind: the folder of the cache that holds the folder.
        files: name -> content: bytes, or a value that is written as JSON.
    """
    digest = sha256(kind.encode())
    for name, content in files.items():
        is_bytes = isinstance(content, bytes)
        data = content if is_bytes else json.dumps(content, sort_keys=True).encode()
        digest.update(f"\0{name}\0".encode() + data)
    folder = cache_dir() / kind / digest.hexdigest()[:16]
    if not folder.is_dir():
        with atomic_output(folder, overwrite=True, wait=True) as temporary:
            temporary.mkdir()
            for name, content in files.items():
                if isinstance(content, bytes):
                    (temporary / name).write_bytes(content)
                else:
                    write_json(temporary / name, content)
    return folder


def cache_dir() -> Path:
    """Return ``$WEIGHTOPS_CACHE``, or by default ``weightops`` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("WEIGHTOPS_CACHE") or Path(user_cache) / "weightops")
