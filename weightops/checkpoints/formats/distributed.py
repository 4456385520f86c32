"""PyTorch's distributed checkpoints: folders of ``.distcp`` files and a ``.metadata``, as FSDP writes them, without a process group."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from weightops.algebra.source import Source, Spec
from weightops.checkpoints.formats.pickle_objects import NAMED_DTYPES, Global, StandIn
from weightops.checkpoints.formats.state_dicts import WRAPPERS
from weightops.checkpoints.formats.torch_source import EXPANSION
from weightops.checkpoints.formats.torch_zip import read_tensor
from weightops.checkpoints.formats.unpickler import Unpickler
from weightops.errors import CheckpointError
from weightops.support.sibling_files import sibling

_MARK = b"torch.distributed.checkpoint.metadata"


class _Chunk(NamedTuple):
    """A box of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class DcpSource(Source):
    """Tensors in boxes, put together when they are read."""

    computed = True

    def __init__(self, path: Path) -> None:
        self.ref = str(path.parent)
        content = path.read_bytes()
        metadata = _fields(Unpickler(io.BytesIO(content), _no_storage, len(content)).load())
        described, paths = (
            _dict(metadata.get("state_dict_metadata")),
            _dict(metadata.get("planner_data")),
        )
        entries = {
            key: _fields(value) for key, value in described.items() if "chunks" in _fields(value)
        }
        names = _names(entries, paths)
        self.skipped = tuple(str(key) for key in described if key not in names)
        places: dict[tuple[Any, Any], StandIn] = {}
        for index, info in _dict(metadata.get("storage_data")).items():
            key = _fields(index)
            places[key.get("fqn"), key.get("offset")] = info
        self.specs, self.ties, self._chunks = {}, {}, {}
        for key, name in names.items():
            self.specs[name] = _spec(name, entries[key])
            self._chunks[name] = [
                _chunk(path, key, chunk, places) for chunk in _list(entries[key]["chunks"])
            ]
            _check_boxes(name, self.specs[name], self._chunks[name])
        files = {chunk.file for chunks in self._chunks.values() for chunk in chunks}
        stats = [file.stat() for file in (path, *sorted(files))]
        claimed = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.specs.values())
        there = sum(s.st_size for s in stats)
        if claimed > EXPANSION * there + 65536:
            raise CheckpointError(f"its tensors claim {claimed:,} bytes, out of files of {there:,}")
        self.identity = ("dcp", *((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))

    specs: dict[str, Spec]
    _chunks: dict[str, list[_Chunk]]

    def read(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        whole = torch.zeros(spec.shape, dtype=spec.dtype)
        for chunk in self._chunks[name]:
            with open(chunk.file, "rb") as stream:
                stream.seek(chunk.start)
                piece = read_tensor(
                    bytearray(stream.read(chunk.length)), f"{chunk.file} at {chunk.start} ({name})"
                )
            if tuple(piece.shape) != chunk.sizes or piece.dtype != spec.dtype:
                raise CheckpointError(
                    f"{chunk.file} holds a part of {name} of shape {tuple(piece.shape)}, not {chunk.sizes}"
                )
            whole[
                tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            ] = piece
        return whole


def _names(entries: dict[Any, Any], paths: dict[Any, Any]) -> dict[Any, str]:
    """Key -> name: of what lies under one of the usual wrappers, without it; else of all."""
    found = {
        key: path if isinstance(path := paths.get(key), tuple) and path else (key,)
        for key in entries
    }
    for wrapper in WRAPPERS:
        inner = {
            key: path[1:] for key, path in found.items() if len(path) > 1 and path[0] == wrapper
        }
        if inner:
            return {key: ".".join(map(str, path)) for key, path in inner.items()}
    return {key: ".".join(map(str, path)) for key, path in found.items()}


def _spec(name: str, entry: dict[str, Any]) -> Spec:
    properties = entry.get("properties")
    state = properties.state if isinstance(properties, StandIn) else None
    kind = state[0] if isinstance(state, tuple) and state else _fields(properties).get("dtype")
    dtype = NAMED_DTYPES.get(kind.name) if isinstance(kind, Global) else None
    if dtype is None:
        raise CheckpointError(f"{name[:200]} has no known dtype in the checkpoint's metadata")
    return Spec(_numbers(entry.get("size"), name), dtype)


def _chunk(path: Path, key: Any, chunk: Any, places: dict[tuple[Any, Any], StandIn]) -> _Chunk:
    box = _fields(chunk)
    offsets, sizes = _numbers(box.get("offsets"), key), _numbers(box.get("sizes"), key)
    place = _fields(places.get((key, offsets)))
    name, start, length = (place.get(part) for part in ("relative_path", "offset", "length"))
    if place.get("transform_descriptors"):
        raise CheckpointError(
            f"{path.parent} holds {str(key)[:200]} transformed (compressed), which weightops can't read"
        )
    if (
        not isinstance(name, str)
        or type(start) is not int
        or type(length) is not int
        or min(start, length) < 0
    ):
        raise CheckpointError(
            f"{path} doesn't say where the part of {str(key)[:200]} at {offsets} lies"
        )
    file = sibling(path, name)
    if start + length > file.stat().st_size:
        raise CheckpointError(f"{path} says that {str(key)[:200]} lies behind the end of {file}")
    return _Chunk(offsets, sizes, file, start, length)


def _check_boxes(name: str, spec: Spec, chunks: list[_Chunk]) -> None:
    """Boxes must lie in the tensor, have bytes enough, and fill it; they don't overlap in what torch writes."""
    sound = all(
        len(c.offsets) == len(spec.shape) == len(c.sizes)
        and all(o + n <= size for o, n, size in zip(c.offsets, c.sizes, spec.shape, strict=True))
        and math.prod(c.sizes) * spec.dtype.itemsize <= c.length
        for c in chunks
    )
    apart = len({c.offsets for c in chunks}) == len(chunks)
    if not sound or not apart or sum(math.prod(c.sizes) for c in chunks) != math.prod(spec.shape):
        raise CheckpointError(
            f"the parts of {name[:200]} don't make up its shape {spec.shape}: files are missing, or damaged"
        )


def _numbers(value: Any, name: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, tuple)
        or len(value) > 64
        or not all(type(n) is int and 0 <= n < 2**40 for n in value)
    ):
        raise CheckpointError(f"the metadata of {str(name)[:200]} have sizes that can't be")
    return value


def _fields(value: Any) -> dict[str, Any]:
    """What was to be put into an object, by name."""
    return value.state if isinstance(value, StandIn) and isinstance(value.state, dict) else {}


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _no_storage(_: Any) -> Any:
    raise CheckpointError("its metadata refer to something outside")


def recognises(path: Path) -> bool:
    """A pickle of torch's checkpoint metadata."""
    with open(path, "rb") as stream:
        return _MARK in stream.read(256)


def open_folder(path: Path) -> Source:
    """The tensors that a ``.metadata`` describes."""
    try:
        source = DcpSource(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path.parent} can't be read as a distributed checkpoint: {error}"
        ) from error
    except (TypeError, ValueError) as error:  # keys that can't be compared, and the like
        raise CheckpointError(
            f"{path} is not sound metadata of a distributed checkpoint: {error}"
        ) from error
    if not source.specs:
        raise CheckpointError(f"{path.parent} is a distributed checkpoint without tensors")
    return source
