"""The cache: files that weightops can compute again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from weightops.errors import OptionError, WeightopsError
from weightops.support.atomic import atomic_output
from weightops.support.json_files import read_json, write_json

ABOUT = "about.json"
"""The file of a table in the cache that says what its rows are."""

LIMIT = "WEIGHTOPS_CACHE_LIMIT"
"""The variable of the environment with the most bytes that prepared pictures may take."""

_LIMIT = 100 * 10**9


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


def cache_limit() -> int:
    """Return ``$WEIGHTOPS_CACHE_LIMIT`` in bytes, by default 100 GB.

    Raises:
        OptionError: if it is no number.
    """
    text = os.environ.get(LIMIT) or str(_LIMIT)
    if not text.isdecimal():
        raise OptionError(f"{LIMIT} is {text!r}, not a number of bytes")
    return int(text)


@dataclass(frozen=True)
class Entry:
    """An entry of the cache: a table, or all other files of a kind.

    Attributes:
        name: KIND/DIGEST for a table, KIND for all other files of a kind.
        path: the folder.
        size: bytes on the disk.
        about: what a table's rows are; empty for others.
        used: when it was last used, in seconds since 1970.
    """

    name: str
    path: Path
    size: int
    about: Mapping[str, Any]
    used: float

    @property
    def used_at(self) -> str:
        """When it was last used, as text."""
        return datetime.fromtimestamp(self.used).isoformat(" ", "minutes")

    @property
    def holds(self) -> str:
        """The content, as text."""
        return f"{self.about['count']:,} {self.about['pictures']}" if self.about else ""

    def remove(self) -> None:
        """Remove it; what has it open keeps it until it ends."""
        shutil.rmtree(self.path, ignore_errors=True)


def entries() -> list[Entry]:
    """Return what the cache holds, the tables last used first."""
    root = cache_dir()
    kinds = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    tables = sorted((t for kind in kinds for t in _tables(kind)), key=lambda e: -e.used)
    others = [
        Entry(kind.name, kind, size, {}, kind.stat().st_mtime)
        for kind in kinds
        if not any(table.path.parent == kind for table in tables) and (size := _size(kind)) > 0
    ]
    return [*tables, *others]


def _tables(kind: Path) -> Iterator[Entry]:
    for path in sorted(kind.iterdir()):
        with suppress(OSError, WeightopsError):  # another process may remove it meanwhile
            half_made = path.name.startswith(".") and path.is_dir()
            about = {"pictures": "half made", "count": 0} if half_made else read_json(path / ABOUT)
            used = (path if half_made else path / ABOUT).stat().st_mtime
            yield Entry(f"{kind.name}/{path.name[:12]}", path, _size(path), about, used)


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.lstat().st_blocks * 512
    return size


def make_room(size: int) -> bool:
    """Remove the tables that were used longest ago until there is room for another one.

    Tables in use stay. Half of the disk's free space stays free.

    Args:
        size: bytes of the other one.

    Returns:
        Whether there is room.
    """
    limit = cache_limit()
    if size > limit:
        return False
    tables = [entry for entry in entries() if entry.about]
    total = sum(entry.size for entry in tables)
    for entry in reversed(tables):
        if total + size <= limit:
            break
        if not _is_used(entry.path):
            entry.remove()
            total -= entry.size
    with suppress(OSError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        return total + size <= limit and shutil.disk_usage(cache_dir()).free >= 2 * size
    return False


def in_use(folder: Path) -> int:
    """Note that a table is used, now and as long as the returned file descriptor is open."""
    os.utime(folder / ABOUT)
    file = os.open(folder / ABOUT, os.O_RDONLY)
    with suppress(ImportError, OSError):  # Windows has no fcntl
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def _is_used(folder: Path) -> bool:
    with suppress(ImportError, FileNotFoundError), open(folder / ABOUT, "rb") as file:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
