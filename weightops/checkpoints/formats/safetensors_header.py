"""Headers of safetensors files, read with all the checks that the safetensors library makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from weightops.algebra.dtypes import NUMBERS_IN_AN_ELEMENT, SAFETENSORS
from weightops.algebra.source import Spec
from weightops.checkpoints.formats.file_source import Extent
from weightops.errors import CheckpointError
from weightops.support.json_files import parse_json

_MOST_BYTES = 100_000_000
"""The most bytes of a header, as in the library."""


_ONLY_IN_FILES = ("F6_E2M3", "F6_E3M2")
"""Dtypes of the format that torch doesn't have."""


class Header(NamedTuple):
    """The content of a file, as its header says it.

    Attributes:
        specs: name -> shape and dtype.
        extents: name -> where the tensor is in the file.
        metadata: texts beside the tensors.
    """

    specs: dict[str, Spec]
    extents: dict[str, Extent]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a file. Nothing stays open or mapped.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MOST_BYTES, path.stat().st_size - 8):
                raise ValueError(f"its header claims {length:,} bytes")
            text = stream.read(length)
        return _checked(path, parse_json(text), 8 + length)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a sound safetensors file: {error}") from error


def _checked(path: Path, header: dict[str, Any], data_start: int) -> Header:
    """Check that each tensor has the bytes of its shape, and all of them fill the file."""
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ are not texts")
    specs = {name: _spec(path, name, entry) for name, entry in header.items()}
    places = {name: _place(name, entry, specs[name]) for name, entry in header.items()}
    end = 0
    for start, stop, name in sorted((*place, name) for name, place in places.items()):
        if start != end:
            raise ValueError(
                f"the data of {name} begin at {start:,}, and those before end at {end:,}"
            )
        end = stop
    size = path.stat().st_size - data_start
    if end != size:
        raise ValueError(f"its tensors claim {end:,} bytes, and it has {size:,} for them")
    extents = {n: Extent(data_start + start, stop - start) for n, (start, stop) in places.items()}
    return Header(specs, extents, metadata)


def _spec(path: Path, name: str, entry: Any) -> Spec:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    kind, shape = entry["dtype"], entry["shape"]
    if not _are_sizes(shape):
        raise ValueError(f"the shape of {name} can't be")
    if kind in _ONLY_IN_FILES:
        raise CheckpointError(f"{path} holds {name} in dtype {kind}, which torch can't read")
    if not isinstance(kind, str) or kind not in SAFETENSORS:
        raise ValueError(f"{name} is in an unknown dtype, {str(kind)[:40]!r}")
    packed = NUMBERS_IN_AN_ELEMENT.get(kind, 1)
    if packed > 1 and shape:
        if shape[-1] % packed:
            raise ValueError(f"{name} of {kind} has a row that ends within a byte")
        shape = [*shape[:-1], shape[-1] // packed]
    return Spec(tuple(shape), SAFETENSORS[kind])


def _place(name: str, entry: dict[str, Any], spec: Spec) -> tuple[int, int]:
    offsets = entry["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError(f"the data_offsets of {name} can't be")
    start, stop = offsets
    if spec.nbytes != stop - start:
        raise ValueError(f"{name} has {stop - start:,} bytes, and its shape takes {spec.nbytes:,}")
    return start, stop


def _are_sizes(value: Any) -> bool:
    """Return whether a value is a list of at most 64 whole numbers of 64 bits."""
    is_short = isinstance(value, list) and len(value) <= 64
    return is_short and all(type(n) is int and 0 <= n < 1 << 64 for n in value)
