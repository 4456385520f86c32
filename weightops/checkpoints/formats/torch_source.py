"""The tensors of a file that ``torch.save`` or ``torch.jit.save`` wrote, in any of its containers.

The pickle in the file is read by `Unpickler`, which executes nothing. State dicts and whole modules
give the same names. Data are read when they are asked for.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from weightops.algebra.dtypes import dtype_of
from weightops.algebra.source import Source, Spec, read_flat
from weightops.checkpoints.formats.file_source import Extent, FileSource
from weightops.checkpoints.formats.pickle_objects import (
    STORAGES,
    Global,
    Storage,
    StoredTensor,
    short_name,
)
from weightops.checkpoints.formats.state_dicts import at_key, named_tensors, weight_keys
from weightops.checkpoints.formats.unpickler import with_refused_names
from weightops.errors import CheckpointError
from weightops.support.budget import Budget
from weightops.support.input_files import InputFile
from weightops.support.lazy import torch

DAMAGE = (
    zipfile.BadZipFile,
    ValueError,
    RecursionError,
    struct.error,
    NotImplementedError,
    EOFError,
)
"""The errors that damaged containers lead to."""

EXPANSION = 8
"""The most bytes of dense tensors for each byte of a file; files that claim more are traps."""


class TorchContent(NamedTuple):
    """The structure of a torch file.

    Attributes:
        value: the object that its pickle describes.
        extents: storage key -> the bytes of the storage.
        refused_names: the names that its pickle asked for and didn't get.
        budget: what may still be made of the file.
    """

    value: Any
    extents: Mapping[str, Extent]
    refused_names: Mapping[str, None]
    budget: Budget


class TorchSource(FileSource):
    """The tensors of one torch file, each built when it is read.

    Nothing stays open or mapped, so that any number of files can be.

    Args:
        path: the file.
        content: its structure.

    Raises:
        CheckpointError: if it holds no tensors, or their bytes aren't all there.
    """

    def __init__(self, path: Path, content: TorchContent) -> None:
        self.ref = str(path)
        file = InputFile.of(path)
        self.files = [file]
        self.identity: object = ("file", path.stat().st_dev, *file.state)
        self._tensors, skipped = named_tensors(content.value, content.budget)
        self.skipped = (*skipped, *content.refused_names)
        self.keys = tuple(weight_keys(content.value, content.budget))
        self._extents = content.extents
        claimed = sum(tensor.nbytes for tensor in set(self._tensors.values()))
        if claimed > EXPANSION * file.size + 65536:
            raise CheckpointError(
                f"its tensors claim {claimed:,} bytes, out of a file of {file.size:,}"
            )
        owners: dict[StoredTensor, str] = {}
        self.ties: dict[str, str] = {}
        for name, tensor in self._tensors.items():
            check_storage(name, tensor.storage, content.extents)
            if tensor.nbytes and owners.setdefault(tensor, name) != name:
                self.ties[name] = owners[tensor]
        self.specs = {name: Spec(t.shape, t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        tensor, [file] = self._tensors[name], self.files
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype))
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
        flat = read_flat(file, self._begin(tensor), span, dtype_of(tensor.dtype))
        return flat.as_strided(tensor.shape, tensor.stride)

    def extent(self, name: str) -> Extent | None:
        tensor = self._tensors[name]
        is_dense = tensor.stride == contiguous_stride(tensor.shape)
        return Extent(self._begin(tensor), tensor.nbytes) if is_dense else None

    def _begin(self, tensor: StoredTensor) -> int:
        """Return where in the file the elements of a tensor begin."""
        storage = tensor.storage
        begin = self._extents[storage.key].start + storage.start * storage.itemsize
        return begin + tensor.offset * tensor.itemsize


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the stride of a tensor whose elements follow each other."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def dense(tensor: StoredTensor, stored: torch.Tensor) -> torch.Tensor:
    """Return a tensor from the bytes of its storage."""
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype))
    storage, width = tensor.storage, tensor.itemsize
    begin = storage.start * storage.itemsize
    elements = stored[begin : begin + storage.numel * storage.itemsize // width * width]
    typed = (elements.clone() if begin % width else elements).view(dtype_of(tensor.dtype))
    return typed.as_strided(tensor.shape, tensor.stride, typed.storage_offset() + tensor.offset)


def check_storage(name: str, storage: Storage, extents: Mapping[str, Extent]) -> None:
    """Check that a file holds the storage of a tensor.

    Raises:
        CheckpointError: naming the tensor.
    """
    extent = extents.get(storage.key)
    if extent is None:
        raise CheckpointError(f"{name} is in storage {storage.key!r}, which it doesn't hold")
    need = (storage.start + storage.numel) * storage.itemsize
    if need > extent.length:
        raise CheckpointError(
            f"{name} is in storage {storage.key!r} of {need:,} bytes, "
            f"of which {extent.length:,} are there"
        )


def open_mapped(
    path: Path, read: Callable[[mmap.mmap], TorchContent], key: str | None = None
) -> Source:
    """Map a file and read its structure with ``read``.

    Args:
        path: the file.
        read: returns the structure of the mapped file.
        key: the key of the dictionary of weights in the file; by default a usual one.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        with (
            open(path, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            content = read(data)
        try:
            if key is None:
                return TorchSource(path, content)
            content = content._replace(value=at_key(content.value, key, content.budget))
            source = TorchSource(path, content)
            source.ref, source.identity = f"{path}:{key}", (source.identity, key)
            return source
        except CheckpointError as error:
            raise with_refused_names(error, content.refused_names) from error
    except CheckpointError as error:
        raise error.prefixed(f"{path} can't be read as a torch file") from error
    except DAMAGE as error:
        raise CheckpointError(f"{path} is not a sound torch file: {str(error)[:200]}") from error


def storage_of(pid: Any) -> Storage:
    """Return the storage that a persistent id ``("storage", class, key, location, numel)`` names.

    Raises:
        CheckpointError: if the persistent id isn't one.
    """
    is_storage = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
    if not is_storage or not isinstance(pid[1], Global) or not is_key(pid[2]):
        raise CheckpointError("its pickle refers to something else than a storage")
    _, kind, key, _, numel, *_ = pid
    dtype = STORAGES.get(kind.name.replace("torch.cuda.", "torch."))
    if dtype is None:
        raise CheckpointError(f"a storage is a {kind.name}, which isn't known")
    if type(numel) is not int or not 0 <= numel < 2**60:
        raise CheckpointError(
            f"storage {short_name(key)!r} has {short_name(numel)} elements, which can't be"
        )
    return Storage(str(key), dtype, 0, numel)


def is_key(value: Any) -> bool:
    """Return whether a value can be the key of a storage: a short text, or a number of 64 bits."""
    is_text = isinstance(value, str) and len(value) <= 200
    return is_text or (isinstance(value, int) and value.bit_length() <= 64)


def view_of(storage: Storage, start: Any, numel: Any) -> Storage:
    """Return a range of elements of a storage.

    Raises:
        CheckpointError: if the numbers can't be a range.
    """
    if not all(type(n) is int and 0 <= n < 2**60 for n in (start, numel)):
        raise CheckpointError(f"a view of storage {storage.key!r} isn't sound")
    return storage._replace(start=start, numel=numel)


def counted_extent(data: mmap.mmap, at: int, storage: Storage) -> Extent:
    """Return the bytes of a storage that follow its number of elements at byte ``at``.

    Raises:
        CheckpointError: if the file ends before.
    """
    head = data[at : at + 8]
    numel = int.from_bytes(head, "little", signed=True)
    length = numel * storage.itemsize
    if len(head) < 8 or numel < 0 or at + 8 + length > len(data):
        raise CheckpointError(
            f"storage {storage.key!r} claims {length:,} bytes, more than the file has"
        )
    return Extent(at + 8, length)


class FileView(io.RawIOBase):
    """The bytes of a file as a stream for libraries that close the stream."""

    def __init__(self, data: mmap.mmap | bytearray) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}
        if starts[whence] + offset < 0:
            raise ValueError("a position before the file")
        self._position = starts[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        chunk = self._data[self._position : self._position + len(buffer)]
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)
