"""Zip archives, which ``torch.jit.save`` writes and, since version 1.6, ``torch.save``."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from pathlib import Path

from weightops.algebra.source import Source
from weightops.checkpoints.formats.file_source import Extent
from weightops.checkpoints.formats.pickle_objects import StoredTensor
from weightops.checkpoints.formats.torch_source import (
    DAMAGE,
    EXPANSION,
    FileView,
    TorchContent,
    check_storage,
    dense,
    open_mapped,
    storage_of,
)
from weightops.checkpoints.formats.unpickler import Unpickler
from weightops.errors import CheckpointError
from weightops.support.budget import Budget
from weightops.support.lazy import torch


def recognises(path: Path) -> bool:
    """Return whether a file is a zip archive with a ``data.pkl``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return False


def open_file(path: Path, key: str | None = None) -> Source:
    """Open the tensors of an archive."""
    return open_mapped(path, read_archive, key)


def read_tensor(data: bytearray, place: str) -> torch.Tensor:
    """Read the bytes of an archive that holds one tensor.

    Raises:
        CheckpointError: naming ``place`` and what is wrong with it.
    """
    try:
        content = read_archive(data)
        tensor = content.value
        if not isinstance(tensor, StoredTensor):
            raise CheckpointError("it isn't a tensor")
        check_storage("the tensor", tensor.storage, content.extents)
        if tensor.nbytes > EXPANSION * len(data):
            raise CheckpointError("it claims more bytes than there are")
    except CheckpointError as error:
        raise error.prefixed(f"{place} can't be read as a torch file") from error
    except DAMAGE as error:
        raise CheckpointError(f"{place} can't be read as a torch file: {error}") from error
    stored = torch.frombuffer(data, dtype=torch.uint8)[content.extents[tensor.storage.key].slice]
    return dense(tensor, stored.clone())


def read_archive(data: mmap.mmap | bytearray) -> TorchContent:
    """Return the structure of an archive."""
    with zipfile.ZipFile(io.BufferedReader(FileView(data))) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise CheckpointError("it holds two members of one name")
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"it holds {'more than one' if roots else 'no'} data.pkl")
    root = roots[0]
    order = members.get(f"{root}byteorder")
    if order is not None and data[_extent(data, order).slice] != b"little":
        raise CheckpointError("its bytes are in big-endian order")
    prefix = f"{root}data/"
    extents = {
        name.removeprefix(prefix): _extent(data, info)
        for name, info in members.items()
        if name.startswith(prefix)
    }
    pickle = bytes(data[_extent(data, members[f"{root}data.pkl"]).slice])
    budget = Budget(min(len(data), 4 * len(pickle)))
    unpickler = Unpickler(io.BytesIO(pickle), storage_of, budget)
    return TorchContent(unpickler.load(), extents, unpickler.refused_names, budget)


def _extent(data: mmap.mmap | bytearray, info: zipfile.ZipInfo) -> Extent:
    """Return the bytes of a member; torch stores members uncompressed."""
    plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    is_encrypted = info.flag_bits & 1
    if not plain or is_encrypted:
        raise CheckpointError(f"{info.filename} is compressed or encrypted, which torch never does")
    begin = max(info.header_offset, 0)
    header = data[begin : begin + 30]
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise CheckpointError(f"{info.filename} isn't where the archive says")
    name_size, extra_size = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_size + extra_size
    if start + info.file_size > len(data):
        raise CheckpointError(
            f"{info.filename} claims {info.file_size:,} bytes, more than the file has"
        )
    return Extent(start, info.file_size)
