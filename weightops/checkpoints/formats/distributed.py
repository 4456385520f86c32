"""PyTorch's distributed checkpoints, as FSDP writes them, read without a process group.

They are folders of ``.distcp`` files with a pickled ``.metadata``.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

from weightops.algebra.source import Source, Spec
from weightops.checkpoints.formats.pickle_objects import NAMED_DTYPES, Global, StandIn, short_name
from weightops.checkpoints.formats.state_dicts import WRAPPERS
from weightops.checkpoints.formats.torch_source import EXPANSION
from weightops.checkpoints.formats.torch_zip import read_tensor
from weightops.checkpoints.formats.unpickler import Unpickler
from weightops.errors import CheckpointError
from weightops.support.budget import OBJECT, Budget
from weightops.support.input_files import InputFile
from weightops.support.lazy import torch
from weightops.support.sibling_files import sibling

_MARK = b"torch.distributed.checkpoint.metadata"


class Chunk(NamedTuple):
    """A box of a tensor, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box in its tensor."""
        pairs = zip(self.offsets, self.sizes, strict=True)
        return tuple(slice(offset, offset + size) for offset, size in pairs)


class DcpSource(Source):
    """Tensors that are stored in boxes and put together when they are read.

    Args:
        path: the ``.metadata`` file.

    Raises:
        CheckpointError: if the metadata aren't sound, or files are missing.
    """

    computed = True

    def __init__(self, path: Path) -> None:
        self.ref = str(path.parent)
        content = path.read_bytes()
        budget = Budget(len(content))
        metadata = _fields(Unpickler(io.BytesIO(content), _no_storage, budget).load())
        described = _dict(metadata.get("state_dict_metadata"))
        entries = {key: _fields(value) for key, value in described.items()}
        entries = {key: fields for key, fields in entries.items() if "chunks" in fields}
        names = _names(entries, _dict(metadata.get("planner_data")), budget)
        self.skipped = tuple(short_name(key) for key in described if key not in names)
        places: dict[tuple[str, str], StandIn] = {}
        for index, place in _dict(metadata.get("storage_data")).items():
            fields = _fields(index)
            name, offset = fields.get("fqn"), fields.get("offset")
            if isinstance(name, str) and _are_numbers(offset):
                places[name, str(offset)] = place
        self.specs: dict[str, Spec] = {}
        self.ties: dict[str, str] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        for key, name in names.items():
            boxes = _list(entries[key]["chunks"])
            budget.spend(OBJECT * len(boxes))
            self.specs[name] = _spec(name, entries[key])
            self._chunks[name] = [_chunk(path, key, box, places) for box in boxes]
            check_boxes(name, self.specs[name], self._chunks[name])
        files = {chunk.file for chunks in self._chunks.values() for chunk in chunks}
        self.files = [InputFile.of(file) for file in (path, *sorted(files))]
        claimed = sum(math.prod(spec.shape) * spec.itemsize for spec in self.specs.values())
        claimed += sum(chunk.length for chunks in self._chunks.values() for chunk in chunks)
        stored = sum(file.size for file in self.files)
        if claimed > EXPANSION * stored + 65536:
            raise CheckpointError(
                f"its tensors claim {claimed:,} bytes, out of files of {stored:,}"
            )
        self.identity = ("dcp", path.stat().st_dev, *(file.state for file in self.files))

    def read(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        tensor = torch.zeros(spec.shape, dtype=spec.dtype)
        for chunk in self._chunks[name]:
            with open(chunk.file, "rb") as stream:
                stream.seek(chunk.start)
                archive = bytearray(stream.read(chunk.length))
            box = read_tensor(archive, f"{chunk.file} at {chunk.start} ({name})")
            if tuple(box.shape) != chunk.sizes or box.dtype != spec.dtype:
                raise CheckpointError(
                    f"{chunk.file} holds a part of {name} of shape {tuple(box.shape)}, "
                    f"not {chunk.sizes}"
                )
            tensor[chunk.slices] = box
        return tensor


def _names(entries: dict[Any, Any], paths: dict[Any, Any], budget: Budget) -> dict[Any, str]:
    """Return key -> name of the tensors under a usual wrapper, without it; else of all weights.

    Scripts save one state of several parts under a key of its own, such as ``app``, and states of
    optimizers beside weights that have none.

    Raises:
        CheckpointError: if two tensors have one name.
    """
    full_paths: dict[Any, tuple[Any, ...]] = {}
    for key in entries:
        path = paths.get(key)
        full_paths[key] = path if isinstance(path, tuple) and 0 < len(path) <= 64 else (key,)
    within = any(len(path) > 2 and path[1] in WRAPPERS for path in full_paths.values())
    if within and len({short_name(path[0]) for path in full_paths.values()}) == 1:
        full_paths = {key: path[1:] for key, path in full_paths.items()}
    for wrapper in WRAPPERS:
        inner = {
            key: path[1:]
            for key, path in full_paths.items()
            if len(path) > 1 and path[0] == wrapper
        }
        if inner:
            full_paths = inner
            break
    else:
        weights = {key: path for key, path in full_paths.items() if not _is_of_optimizer(path)}
        full_paths = weights or full_paths
    names: dict[str, Any] = {}
    for key, path in full_paths.items():
        name = ".".join(map(short_name, path))
        budget.spend(len(name))
        if names.setdefault(name, key) is not key:
            raise CheckpointError(f"two of its tensors are named {name[:200]}")
    return {key: name for name, key in names.items()}


def _is_of_optimizer(path: tuple[Any, ...]) -> bool:
    return len(path) > 1 and str(path[0]).startswith(("optim", "opt_"))


def _spec(name: str, entry: dict[str, Any]) -> Spec:
    properties = entry.get("properties")
    state = properties.state if isinstance(properties, StandIn) else None
    named = state[0] if isinstance(state, tuple) and state else _fields(properties).get("dtype")
    dtype = NAMED_DTYPES.get(named.name) if isinstance(named, Global) else None
    if dtype is None:
        raise CheckpointError(f"{name[:200]} has no known dtype in the checkpoint's metadata")
    return Spec(_numbers(entry.get("size"), name), dtype)


def _chunk(path: Path, key: Any, box: Any, places: dict[tuple[str, str], StandIn]) -> Chunk:
    """Return a box of the tensor ``key`` with the place of its bytes."""
    short_key = short_name(key)
    fields = _fields(box)
    offsets, sizes = _numbers(fields.get("offsets"), key), _numbers(fields.get("sizes"), key)
    place = _fields(places.get((key, str(offsets))))
    name, start, length = (place.get(part) for part in ("relative_path", "offset", "length"))
    if place.get("transform_descriptors"):
        raise CheckpointError(
            f"{path.parent} holds {short_key} transformed (compressed), which weightops can't read"
        )
    if (
        not isinstance(name, str)
        or type(start) is not int
        or type(length) is not int
        or min(start, length) < 0
    ):
        raise CheckpointError(f"{path} doesn't say where the part of {short_key} at {offsets} is")
    file = sibling(path, name)
    if start + length > file.stat().st_size:
        raise CheckpointError(f"{path} says that {short_key} is behind the end of {file}")
    return Chunk(offsets, sizes, file, start, length)


def check_boxes(name: str, spec: Spec, chunks: list[Chunk]) -> None:
    """Check that boxes are in their tensor, have enough bytes, and fill the tensor.

    In checkpoints by torch, boxes don't overlap.
    """
    sound = all(
        len(chunk.offsets) == len(spec.shape) == len(chunk.sizes)
        and all(s.stop <= size for s, size in zip(chunk.slices, spec.shape, strict=True))
        and math.prod(chunk.sizes) * spec.itemsize <= chunk.length
        for chunk in chunks
    )
    apart = len({str(chunk.offsets) for chunk in chunks}) == len(chunks)
    numel = sum(math.prod(chunk.sizes) for chunk in chunks)
    if not sound or not apart or numel != math.prod(spec.shape):
        raise CheckpointError(
            f"the parts of {name[:200]} don't make up its shape {spec.shape}: "
            "files are missing, or damaged"
        )


def _numbers(value: Any, name: Any) -> tuple[int, ...]:
    if not _are_numbers(value):
        raise CheckpointError(f"the metadata of {short_name(name)} have sizes that can't be")
    return tuple(value)


def _are_numbers(value: Any) -> bool:
    is_short = isinstance(value, tuple) and len(value) <= 64
    return is_short and all(type(n) is int and 0 <= n < 2**40 for n in value)


def _fields(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that wasn't built."""
    return value.state if isinstance(value, StandIn) and isinstance(value.state, dict) else {}


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _no_storage(_: Any) -> Any:
    raise CheckpointError("its metadata refer to something outside")


def recognises(path: Path) -> bool:
    """Return whether a file is a pickle of torch's checkpoint metadata."""
    with open(path, "rb") as stream:
        return _MARK in stream.read(256)


def open_folder(path: Path) -> Source:
    """Open the tensors that a ``.metadata`` describes.

    Raises:
        CheckpointError: naming the folder and what is wrong with it.
    """
    try:
        source = DcpSource(path)
    except CheckpointError as error:
        raise error.prefixed(f"{path.parent} can't be read as a distributed checkpoint") from error
    except (TypeError, ValueError) as error:  # keys that can't be compared, and the like
        raise CheckpointError(
            f"{path} is not sound metadata of a distributed checkpoint: {error}"
        ) from error
    if not source.specs:
        raise CheckpointError(f"{path.parent} is a distributed checkpoint without tensors")
    return source
