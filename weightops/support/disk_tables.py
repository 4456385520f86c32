"""Tables of rows of bytes in the cache, which processes fill together and read by memory maps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import finalize
from zlib import crc32

if TYPE_CHECKING:
    import numpy.typing as npt

from weightops.errors import OutputError
from weightops.support.cache import ABOUT, cache_dir, in_use, make_room
from weightops.support.json_files import write_json
from weightops.support.lazy import np
from weightops.support.locks import exclusive

_ROWS, _MARKS = "rows.bin", "marks.bin"

Bytes: TypeAlias = "npt.NDArray[np.uint8]"
Indices: TypeAlias = "npt.NDArray[np.int64]"


class DiskTable:
    """A table of rows in two files: the rows, and a mark for each that is there: its CRC-32.

    A row is there if it agrees with its mark, so that neither a killed process nor a crash of the
    system leaves half a row. All processes write the same bytes at a place: it makes no difference
    who is first. A table appears whole, with no row marked.

    Attributes:
        folder: the folder of the table.
        rows: the rows, ``uint8``, of shape ``(count, *shape)``.
    """

    def __init__(self, folder: Path, count: int, shape: tuple[int, ...]) -> None:
        self.folder = folder
        finalize(self, os.close, in_use(folder))
        self.rows: Bytes = np.memmap(folder / _ROWS, np.uint8, "r+", shape=(count, *shape))
        self._marks = np.memmap(folder / _MARKS, np.uint32, "r+", shape=(count,))
        self._sound = np.zeros(count, dtype=bool)

    @classmethod
    def open(
        cls, kind: str, digest: str, count: int, shape: tuple[int, ...], about: Mapping[str, Any]
    ) -> DiskTable | None:
        """Open a table of the cache, which is made if it isn't there.

        Args:
            kind: the folder of the cache that holds the table.
            digest: hex digits of all that the rows depend on.
            count: the number of rows.
            shape: the shape of a row.
            about: what the rows are, for a listing.

        Returns:
            None if the cache has no room for the table.
        """
        folder = cache_dir() / kind / digest[:32]
        size = count * int(np.prod(shape))
        for _ in range(3):  # another process may remove the table meanwhile
            with suppress(OSError, ValueError):
                return cls(folder, count, shape)
            if not make_room(size):
                return None
            try:
                _make(folder, {_ROWS: size, _MARKS: 4 * count}, {**about, "count": count})
            except OSError:
                return None
        return None

    def missing(self, indices: Indices) -> Indices:
        """Return the indices of the rows that aren't there, each once, in order."""
        unknown = np.unique(indices[~self._sound[indices]])
        for i in unknown.tolist():
            self._sound[i] = self._marks[i] != 0 and self._marks[i] == _mark(self.rows[i])
        return unknown[~self._sound[unknown]]

    def put(self, index: int, row: Bytes) -> None:
        """Write a row, and then its mark."""
        self.rows[index] = row
        self._marks[index] = _mark(row)
        self._sound[index] = True

    def discard(self) -> None:
        """Take all marks away."""
        self._marks[:] = 0
        self._sound[:] = False

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Wait while another process fills the table, and keep others waiting."""
        with ExitStack() as stack:
            with suppress(OutputError, OSError):  # without locks, they fill it side by side
                stack.enter_context(exclusive(self.folder, wait=True))
            yield


def _mark(row: Bytes) -> int:
    return crc32(np.ascontiguousarray(row).data) or 1


def _make(folder: Path, sizes: Mapping[str, int], about: Mapping[str, Any]) -> None:
    """Make an empty table beside its place, and rename it; its room on the disk is reserved."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(mkdtemp(prefix=".", dir=folder.parent))
    try:
        for name, size in sizes.items():
            with open(stage / name, "wb") as file:
                if hasattr(os, "posix_fallocate") and size:  # else a full disk ends the process
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
        write_json(stage / ABOUT, about)
        with suppress(OSError):  # another process was first
            os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
