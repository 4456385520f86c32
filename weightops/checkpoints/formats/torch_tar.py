"""Tar archives, which ``torch.save`` wrote before version 0.1.10."""

from __future__ import annotations

import mmap
import struct
from collections import ChainMap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightops.algebra.source import Source
from weightops.checkpoints.formats.file_source import Extent
from weightops.checkpoints.formats.pickle_calls import stored_tensor
from weightops.checkpoints.formats.pickle_objects import Storage, StoredTensor, short_name
from weightops.checkpoints.formats.torch_source import (
    TorchContent,
    counted_extent,
    is_key,
    open_mapped,
    storage_of,
    view_of,
)
from weightops.checkpoints.formats.unpickler import Unpickler
from weightops.errors import CheckpointError
from weightops.support.budget import Budget

_MEMBERS = {"storages", "tensors", "pickle"}
_BLOCK = 512


def recognises(path: Path) -> bool:
    """Return whether a file is a tar archive with the members that torch wrote."""
    with open(path, "rb") as stream:
        head = stream.read(_BLOCK)
        if len(head) < _BLOCK or not _is_header(head):
            return False
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return members(data).keys() >= _MEMBERS


def members(data: mmap.mmap) -> dict[str, int]:
    """Return the name of each file in a tar archive, and where its bytes begin.

    Of headers, the fields that every kind of tar has are read: what follows a header that isn't
    sound doesn't count, and sizes lead on, never back.
    """
    offsets: dict[str, int] = {}
    at = 0
    while at + _BLOCK <= len(data) and _is_header(header := data[at : at + _BLOCK]):
        at += _BLOCK
        if header[156:157] in (b"0", b"\0"):
            offsets[header[:100].partition(b"\0")[0].decode("utf-8", "replace")] = at
        at += -(-int(header[124:136].strip(b" \0"), 8) // _BLOCK) * _BLOCK
    return offsets


def _is_header(block: bytes) -> bool:
    """Return whether a block has the checksum and the size of a file's header."""
    size, checksum = (field.strip(b" \0") for field in (block[124:136], block[148:156]))
    if not (size + checksum).isdigit() or set(size + checksum) & set(b"89") or not checksum:
        return False
    return bool(size) and int(checksum, 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def open_file(path: Path, key: str | None = None) -> Source:
    """Open the tensors of a file."""
    return open_mapped(path, lambda data: _TarReader(data).read(), key)


class _TarReader:
    """Reads the tables of storages and tensors, and the pickle that refers to them by key."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._budget = data, Budget(len(data))
        self._storages: dict[str, Storage] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self._extents: dict[str, Extent] = {}
        self._known: ChainMap[str, Any] = ChainMap(self._tensors, self._storages)

    def read(self) -> TorchContent:
        """Return the structure of the archive."""
        offsets = members(self._data)
        if not offsets.keys() >= _MEMBERS:
            raise CheckpointError(f"it lacks one of {', '.join(sorted(_MEMBERS))}")
        self._data.seek(offsets["storages"])
        self._read_storages()
        self._data.seek(offsets["tensors"])
        self._read_tensors()
        self._data.seek(offsets["pickle"])
        value, refused_names = self._unpickle(self._persistent)
        return TorchContent(value, self._extents, refused_names, self._budget)

    def _read_storages(self) -> None:
        for _ in range(self._count()):
            key, _, kind = self._table_entry()
            storage = storage_of(("storage", kind, key, "cpu", 0))
            extent = counted_extent(self._data, self._data.tell(), storage)
            numel = extent.length // storage.itemsize
            self._extents[str(key)] = extent
            self._storages[str(key)] = storage._replace(numel=numel)
            self._data.seek(extent.slice.stop)
        views, _ = self._unpickle(storage_of)
        for view in views if isinstance(views, list) else ():
            if not isinstance(view, tuple) or len(view) != 4:
                raise CheckpointError("a view of a storage isn't sound")
            key, root, start, numel = view
            if not is_key(key) or not is_key(root) or str(root) not in self._storages:
                raise CheckpointError(f"a view of storage {short_name(root)[:40]!r} isn't sound")
            self._storages[str(key)] = view_of(self._storages[str(root)], start, numel)

    def _read_tensors(self) -> None:
        for _ in range(self._count()):
            key, storage_key, _ = self._table_entry()
            dimensions = int.from_bytes(self._data.read(8)[:4], "little")
            if dimensions > 64:
                raise CheckpointError(f"a tensor of {dimensions} dimensions can't be")
            count = 2 * dimensions + 1
            *shape_and_stride, offset = struct.unpack(f"<{count}q", self._data.read(8 * count))
            self._tensors[str(key)] = stored_tensor(
                self._storages.get(str(storage_key)) if is_key(storage_key) else None,
                offset,
                tuple(shape_and_stride[:dimensions]),
                tuple(shape_and_stride[dimensions:]),
            )

    def _persistent(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid:
            return pid[0]  # the class of a module, beside its source code
        if not is_key(pid) or str(pid) not in self._known:
            raise CheckpointError("its pickle refers to a tensor that it doesn't hold")
        return self._known[str(pid)]

    def _unpickle(self, persistent: Callable[[Any], Any]) -> tuple[Any, Mapping[str, None]]:
        unpickler = Unpickler(self._data, persistent, self._budget)  # type: ignore[arg-type]
        return unpickler.load(), unpickler.refused_names

    def _count(self) -> int:
        count, _ = self._unpickle(storage_of)
        if type(count) is not int or not 0 <= count <= len(self._data):
            raise CheckpointError("a count in its tables can't be")
        return count

    def _table_entry(self) -> tuple[Any, Any, Any]:
        entry, _ = self._unpickle(storage_of)
        if not isinstance(entry, tuple) or len(entry) != 3 or not is_key(entry[0]):
            raise CheckpointError("an entry of its tables isn't sound")
        return entry
