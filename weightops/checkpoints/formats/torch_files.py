"""What ``torch.save`` and ``torch.jit.save`` have written since 2016: zip archives, plain streams and tar archives.

The pickle in them is read by `pickles`, which runs nothing; state dicts and whole modules give the same names. Data are mapped
from disk where they are aligned, as they are in zip archives.
"""

from __future__ import annotations

import io
import mmap
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from weightops.algebra.source import Source, Spec
from weightops.checkpoints.formats.state_dicts import named_tensors
from weightops.checkpoints.formats.unpickler import (
    STORAGES,
    Global,
    Storage,
    StoredTensor,
    Unpickler,
    asked_for,
    tensor,
)
from weightops.errors import CheckpointError

_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_TAR = ("storages", "tensors", "pickle")
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    ValueError,
    struct.error,
    NotImplementedError,
    EOFError,
)
EXPANSION = 8
"""Tensors may take so many times the file's bytes when they are made dense; files that claim more are traps."""


class Extent(NamedTuple):
    """Where bytes lie in a file."""

    start: int
    length: int


class TorchSource(Source):
    """Tensors of one file, each made when it is read.

    Args:
        path: the file.
        content: the object that the file holds.
        extents: where the bytes of each storage key lie.
        data: the bytes of the file.
        names: what its pickle asked for and didn't get.
    """

    def __init__(
        self,
        path: Path,
        content: Any,
        extents: Mapping[str, Extent],
        data: mmap.mmap,
        names: Mapping[str, None],
    ) -> None:
        self.ref = str(path)
        self._tensors, passed_over = named_tensors(content)
        self.skipped = (*passed_over, *names)
        self._extents, self._data = extents, torch.frombuffer(data, dtype=torch.uint8)
        self._copies: dict[str, torch.Tensor] = {}
        total = sum(described.nbytes for described in set(self._tensors.values()))
        if total > EXPANSION * len(self._data) + 65536:
            raise CheckpointError(
                f"its tensors claim {total:,} bytes, out of a file of {len(self._data):,}"
            )
        for name, described in self._tensors.items():
            _check_room(name, described.storage, extents)
        self.specs = {name: Spec(t.shape, t.dtype) for name, t in self._tensors.items()}
        first: dict[StoredTensor, str] = {}
        owners = {name: first.setdefault(t, name) for name, t in self._tensors.items() if t.nbytes}
        self.ties = {name: owner for name, owner in owners.items() if owner != name}
        stat = path.stat()
        self.identity = ("file", stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def read(self, name: str) -> torch.Tensor:
        described = self._tensors[name]
        extent = self._extents[described.storage.key]
        flat = self._data[slice(*_span(extent))]
        if extent.start % 16:  # not aligned for the processor: copied once
            if described.storage.key not in self._copies:
                self._copies[described.storage.key] = flat.clone()
            flat = self._copies[described.storage.key]
        return _made(described, flat)


def _span(extent: Extent) -> tuple[int, int]:
    return extent.start, extent.start + extent.length


def _made(described: StoredTensor, flat: torch.Tensor) -> torch.Tensor:
    """A tensor of the bytes of its storage."""
    if not described.nbytes:
        return torch.empty(described.shape, dtype=described.dtype)
    storage, width = described.storage, described.dtype.itemsize
    begin = storage.start * storage.dtype.itemsize
    flat = flat[begin : begin + storage.numel * storage.dtype.itemsize // width * width]
    typed = (flat.clone() if begin % width else flat).view(described.dtype)
    return typed.as_strided(
        described.shape, described.stride, typed.storage_offset() + described.offset
    )


def _check_room(name: str, storage: Storage, extents: Mapping[str, Extent]) -> None:
    extent = extents.get(storage.key)
    if extent is None:
        raise CheckpointError(f"{name} lies in storage {storage.key!r}, which it doesn't hold")
    need = (storage.start + storage.numel) * storage.dtype.itemsize
    if need > extent.length:
        raise CheckpointError(
            f"{name} lies in storage {storage.key!r} of {need:,} bytes, of which {extent.length:,} are there"
        )


def _open(
    path: Path, read: Callable[[mmap.mmap], tuple[Any, Mapping[str, Extent], Mapping[str, None]]]
) -> Source:
    """Map a file, read its structure, and name it in whatever is wrong with it."""
    try:
        with open(path, "rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        content, extents, names = read(data)
        try:
            return TorchSource(path, content, extents, data, names)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{asked_for(names)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be read as a torch file: {error}") from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is not a sound torch file: {str(error)[:200]}") from error


def _storage(pid: Any, start: int = 0) -> Storage:
    """The storage that a persistent id ``("storage", class, key, location, numel)`` speaks of."""
    if (
        not isinstance(pid, tuple)
        or len(pid) < 5
        or pid[0] != "storage"
        or not isinstance(pid[1], Global)
    ):
        raise CheckpointError("its pickle refers to something else than a storage")
    _, kind, key, _, numel, *_ = pid
    dtype = STORAGES.get(kind.name.replace("torch.cuda.", "torch."))
    if dtype is None:
        raise CheckpointError(f"a storage is a {kind.name}, which isn't known")
    if type(numel) is not int or not 0 <= numel < 2**60:
        raise CheckpointError(
            f"storage {str(key)!r} has {str(numel)[:40]} elements, which can't be"
        )
    return Storage(str(key), dtype, start, numel)


def read_one(data: bytearray, place: str) -> torch.Tensor:
    """The one tensor that the bytes of an archive hold."""
    try:
        content, extents, _ = read_zip(data)
        if not isinstance(content, StoredTensor):
            raise CheckpointError("it isn't a tensor")
        _check_room("the tensor", content.storage, extents)
        if content.nbytes > EXPANSION * len(data):
            raise CheckpointError("it claims more bytes than there are")
    except (CheckpointError, *_DAMAGE) as error:
        raise CheckpointError(f"{place} can't be read as a torch file: {error}") from error
    return _made(
        content,
        torch.frombuffer(data, dtype=torch.uint8)[
            slice(*_span(extents[content.storage.key]))
        ].clone(),
    )


# ---------------------------------------------------------------------------- zip


def recognises_zip(path: Path) -> bool:
    """A zip archive with a ``data.pkl``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return False


def open_zip(path: Path) -> Source:
    """The tensors of an archive by ``torch.save`` or ``torch.jit.save``."""
    return _open(path, read_zip)


def read_zip(data: mmap.mmap | bytearray) -> tuple[Any, Mapping[str, Extent], Mapping[str, None]]:
    """The object of an archive, where its storages lie, and the names that weren't given."""
    with zipfile.ZipFile(io.BufferedReader(_View(data))) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise CheckpointError("it holds two members of one name")
    [root, *others] = [
        name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")
    ]
    if others:
        raise CheckpointError("it holds more than one data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and _bytes(data, order) != b"little":
        raise CheckpointError("its bytes are in big-endian order")
    prefix = f"{root}data/"
    extents = {
        name[len(prefix) :]: _extent(data, info)
        for name, info in entries.items()
        if name.startswith(prefix)
    }
    pickle = _bytes(data, entries[f"{root}data.pkl"])
    unpickler = Unpickler(io.BytesIO(pickle), _storage, len(pickle))
    return unpickler.load(), extents, unpickler.names


def _bytes(data: mmap.mmap | bytearray, info: zipfile.ZipInfo) -> bytes:
    extent = _extent(data, info)
    return bytes(data[slice(*_span(extent))])


def _extent(data: mmap.mmap | bytearray, info: zipfile.ZipInfo) -> Extent:
    """Where a member's bytes lie; torch stores them as they are."""
    if (
        info.compress_type != zipfile.ZIP_STORED
        or info.file_size != info.compress_size
        or info.flag_bits & 1
    ):
        raise CheckpointError(f"{info.filename} is compressed or encrypted, which torch never does")
    header = data[max(info.header_offset, 0) : max(info.header_offset, 0) + 30]
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise CheckpointError(f"{info.filename} isn't where the archive says")
    name, extra = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > len(data):
        raise CheckpointError(
            f"{info.filename} claims {info.file_size:,} bytes, more than the file has"
        )
    return Extent(start, info.file_size)


class _View(io.RawIOBase):
    """A mapped file for `zipfile`, which would close it."""

    def __init__(self, data: mmap.mmap | bytearray) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if start + offset < 0:
            raise ValueError("a position before the file")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


# ------------------------------------------------------------- the stream before zip


def recognises_stream(path: Path) -> bool:
    """A pickle of torch's magic number."""
    with open(path, "rb") as stream:
        return _MAGIC in stream.read(32)


def open_stream(path: Path) -> Source:
    """The tensors of a file by ``torch.save`` before 1.6, or with ``_use_new_zipfile_serialization=False``."""
    return _open(path, _read_stream)


def _read_stream(data: mmap.mmap) -> tuple[Any, Mapping[str, Extent], Mapping[str, None]]:
    roots: dict[str, Storage] = {}

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
            return pid[1]
        view = pid[5] if isinstance(pid, tuple) and len(pid) > 5 else None
        root = _storage(pid)
        roots.setdefault(root.key, root)
        if view is None:
            return root
        if (
            not isinstance(view, tuple)
            or len(view) != 3
            or not all(type(n) is int and 0 <= n < 2**60 for n in view[1:])
        ):
            raise CheckpointError(f"a view of storage {root.key!r} isn't sound")
        return root._replace(start=view[1], numel=view[2])

    parts = [Unpickler(data, persistent, len(data)) for _ in range(5)]  # type: ignore[arg-type]
    magic, protocol, system, content, keys = (part.load() for part in parts)
    if magic != int.from_bytes(_MAGIC, "little") or protocol != 1001:
        raise CheckpointError(f"it is of protocol {str(protocol)[:40]}, not 1001")
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise CheckpointError("its bytes are in big-endian order")
    return content, _extents(data, data.tell(), keys, roots), parts[3].names


def _extents(
    data: mmap.mmap, at: int, keys: Any, roots: Mapping[str, Storage]
) -> dict[str, Extent]:
    """Where storages lie that follow each other, each after its number of elements."""
    if not isinstance(keys, list) or not all(isinstance(key, (str, int)) for key in keys):
        raise CheckpointError("its list of storages isn't sound")
    extents = {}
    for key in map(str, keys):
        root = roots.get(key)
        if root is None:
            raise CheckpointError(f"storage {key!r} belongs to nothing")
        extents[key], at = _sized(data, at, root)
    return extents


def _sized(data: mmap.mmap, at: int, storage: Storage) -> tuple[Extent, int]:
    """Where a storage's bytes lie whose number of elements comes first, and where what follows begins."""
    head = data[at : at + 8]
    numel = int.from_bytes(head, "little", signed=True)
    length = numel * storage.dtype.itemsize
    if len(head) < 8 or numel < 0 or at + 8 + length > len(data):
        raise CheckpointError(
            f"storage {storage.key!r} claims {length:,} bytes, more than the file has"
        )
    return Extent(at + 8, length), at + 8 + length


# ------------------------------------------------------------------- tar before that


def recognises_tar(path: Path) -> bool:
    """A tar archive with what torch put into it."""
    try:
        with tarfile.open(path, "r:") as archive:
            return {*_TAR} <= {member.name for member in archive.getmembers()[:16]}
    except (tarfile.TarError, ValueError, EOFError, OSError):
        return False


def open_tar(path: Path) -> Source:
    """The tensors of a file by ``torch.save`` before 0.1.10."""
    return _open(path, _read_tar)


def _read_tar(data: mmap.mmap) -> tuple[Any, Mapping[str, Extent], Mapping[str, None]]:
    with tarfile.open(fileobj=io.BufferedReader(_View(data)), mode="r:") as archive:
        places = {
            member.name: member.offset_data for member in archive.getmembers() if member.isreg()
        }
    if not {*_TAR} <= places.keys():
        raise CheckpointError(f"it lacks one of {', '.join(_TAR)}")

    def load(persistent: Callable[[Any], Any]) -> tuple[Any, Mapping[str, None]]:
        unpickler = Unpickler(data, persistent, len(data))  # type: ignore[arg-type]
        return unpickler.load(), unpickler.names

    def plain(count: int) -> tuple[Any, ...]:
        value, _ = load(_storage)
        if (
            not isinstance(value, tuple)
            or len(value) != count
            or not isinstance(value[0], (str, int))
        ):
            raise CheckpointError("an entry of its tables isn't sound")
        return value

    known: dict[str, Storage | StoredTensor] = {}
    extents: dict[str, Extent] = {}
    data.seek(places["storages"])
    for _ in range(_count(load(_storage)[0], data)):
        key, _, kind = plain(3)
        storage = _storage(("storage", kind, key, "cpu", 0))
        extents[str(key)], after = _sized(data, data.tell(), storage)
        known[str(key)] = storage._replace(numel=extents[str(key)].length // storage.dtype.itemsize)
        data.seek(after)
    views, _ = load(_storage)
    for key, root, start, numel in views if isinstance(views, list) else ():
        whole = known.get(str(root))
        if not isinstance(whole, Storage) or not all(
            type(n) is int and 0 <= n < 2**60 for n in (start, numel)
        ):
            raise CheckpointError(f"a view of storage {str(root)[:40]!r} isn't sound")
        known[str(key)] = whole._replace(start=start, numel=numel)
    data.seek(places["tensors"])
    for _ in range(_count(load(_storage)[0], data)):
        key, storage_key, _ = plain(3)
        dimensions = int.from_bytes(data.read(8)[:4], "little")
        if dimensions > 64:
            raise CheckpointError(f"a tensor of {dimensions} dimensions can't be")
        numbers = struct.unpack(f"<{2 * dimensions + 1}q", data.read(8 * (2 * dimensions + 1)))
        known[str(key)] = tensor(
            known.get(str(storage_key)), numbers[-1], numbers[:dimensions], numbers[dimensions:-1]
        )

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and pid:
            return pid[0]  # a module's class, with its source
        if not isinstance(pid, (str, int)) or str(pid) not in known:
            raise CheckpointError("its pickle refers to a tensor that it doesn't hold")
        return known[str(pid)]

    data.seek(places["pickle"])
    content, names = load(persistent)
    return content, extents, names


def _count(value: Any, data: mmap.mmap) -> int:
    if type(value) is not int or not 0 <= value <= len(data):
        raise CheckpointError("a count in its tables can't be")
    return value
