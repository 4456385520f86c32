"""Streams of pickles, which ``torch.save`` wrote before version 1.6."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightops.algebra.source import Source
from weightops.checkpoints.formats.file_source import Extent
from weightops.checkpoints.formats.pickle_objects import Storage, short_name
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

_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")


def recognises(path: Path) -> bool:
    """Return whether a file begins with a pickle of torch's magic number."""
    with open(path, "rb") as stream:
        return _MAGIC in stream.read(32)


def open_file(path: Path, key: str | None = None) -> Source:
    """Open the tensors of a file."""
    return open_mapped(path, _read_stream, key)


def _read_stream(data: mmap.mmap) -> TorchContent:
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
            return pid[1]
        storage = storage_of(pid)
        storages.setdefault(storage.key, storage)
        view = pid[5] if len(pid) > 5 else None
        if view is None:
            return storage
        if not isinstance(view, tuple) or len(view) != 3:
            raise CheckpointError(f"a view of storage {storage.key!r} isn't sound")
        _, start, numel = view
        return view_of(storage, start, numel)

    # The pickles follow each other: `mmap` keeps the position.
    budget = Budget(len(data))
    pickles = [Unpickler(data, persistent, budget) for _ in range(5)]  # type: ignore[arg-type]
    magic, protocol, system, value, keys = (pickle.load() for pickle in pickles)
    if magic != int.from_bytes(_MAGIC, "little") or protocol != 1001:
        raise CheckpointError(f"it is of protocol {short_name(protocol)}, not 1001")
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise CheckpointError("its bytes are in big-endian order")
    extents = _extents(data, keys, storages)
    return TorchContent(value, extents, pickles[3].refused_names, budget)


def _extents(data: mmap.mmap, keys: Any, storages: Mapping[str, Storage]) -> dict[str, Extent]:
    """Return the bytes of each storage; they follow the pickles in the order of ``keys``."""
    if not isinstance(keys, list) or not all(map(is_key, keys)):
        raise CheckpointError("its list of storages isn't sound")
    extents = {}
    at = data.tell()
    for key in map(str, keys):
        if key not in storages:
            raise CheckpointError(f"storage {key!r} belongs to nothing")
        extents[key] = counted_extent(data, at, storages[key])
        at = extents[key].slice.stop
    return extents
