"""safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weightops.algebra.dtypes import NUMBERS_IN_AN_ELEMENT, SAFETENSORS
from weightops.algebra.scratch import Scratch, Slot
from weightops.algebra.source import SAMPLED_WHOLE, Source, Spec, read_flat, sample_blocks
from weightops.checkpoints.formats.compressed import CompressedSource
from weightops.checkpoints.formats.packed import PackedSource, packed_record
from weightops.errors import CheckpointError
from weightops.support.input_files import InputFile
from weightops.support.json_files import unique_keys

_CPU = torch.device("cpu")

RECORD = "weightops"
"""The metadata key of the provenance record that weightops writes."""

MODEL_SPEC = "modelspec."
"""The beginning of the metadata keys that describe a model for people (ModelSpec)."""


class SafetensorsSource(Source):
    """Tensors of one safetensors file, each read when it is asked for.

    Attributes:
        offsets: where each tensor begins in the whole one, by name, in files that a distributed
            checkpoint may have parts in; None for other files.
    """

    def __init__(self, path: Path) -> None:
        self.ref = str(path)
        file = InputFile.of(path)
        self.files = [file]
        self.identity = ("file", path.stat().st_dev, *file.state)
        header, data_start = _open(path)
        metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.metadata = metadata
        stored = {name: _spec(path, name, entry) for name, entry in header.items()}
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        self._extents = {n: (data_start + start, end - start) for n, (start, end) in places.items()}
        self.ties = {
            alias: name
            for alias, name in metadata.items()
            if name in stored and alias not in stored and not alias.startswith(MODEL_SPEC)
            if _may_be_alias(alias, name) or (RECORD in metadata and alias != "format")
        }
        self.specs = {**stored, **{alias: stored[name] for alias, name in self.ties.items()}}
        self.made_from = _record(metadata)
        self.offsets = _offsets(metadata)
        self.space = "delta" if self.made_from.get("space") == "delta" else "weights"

    def read(self, name: str) -> torch.Tensor:
        name = self.ties.get(name, name)
        spec, [file] = self.specs[name], self.files
        begin, _ = self._extents[name]
        return read_flat(file, begin, spec.numel, spec.dtype).reshape(spec.shape)

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        name = self.ties.get(name, name)
        (begin, _), dtype = self._extents[name], self.specs[name].dtype
        [file] = self.files

        def elements(start: int, stop: int) -> torch.Tensor:
            out = scratch.get(Slot.RESULT, stop - start, dtype, _CPU)
            data = out.view(torch.uint8).numpy().data
            file.read_into(data, begin + start * dtype.itemsize)
            return out

        return elements

    def read_run(self, names: Sequence[str], scratch: Scratch) -> torch.Tensor:
        owners = [self.ties.get(name, name) for name in names]
        numel = sum(self.specs[name].numel for name in owners)
        run = scratch.get(Slot.ROWS, numel, self.specs[owners[0]].dtype, _CPU)
        self._read_bytes(
            run.view(torch.uint8).numpy().data, [self._extents[name] for name in owners]
        )
        return run

    def samples(self, names: Iterable[str]) -> Iterator[bytes]:
        remaining = iter(names)
        while batch := list(islice(remaining, 256)):
            extents = [self._sampled(name) for name in batch]
            sizes = [sum(length for _, length in blocks) for blocks in extents]
            buffer = memoryview(bytearray(sum(sizes)))
            self._read_bytes(buffer, chain.from_iterable(extents))
            for size in sizes:
                yield bytes(buffer[:size])
                buffer = buffer[size:]

    def _sampled(self, name: str) -> list[tuple[int, int]]:
        """Return the extents of the blocks in a tensor's sample."""
        begin, length = whole = self._extents[self.ties.get(name, name)]
        if length <= SAMPLED_WHOLE:
            return [whole]
        width = self.specs[name].dtype.itemsize
        blocks = sample_blocks(length // width, width)
        return [(begin + start * width, count * width) for start, count in blocks]

    def _read_bytes(self, buffer: memoryview, extents: Iterable[tuple[int, int]]) -> None:
        """Fill a buffer with parts of the file, one after another; neighbours are read together."""
        [file] = self.files
        ranges, begin, end = [], 0, 0
        for start, length in extents:
            if start == end:
                end += length
                continue
            ranges.append((buffer[: end - begin], begin))
            buffer, begin, end = buffer[end - begin :], start, start + length
        file.read_ranges([*ranges, (buffer, begin)])


def _spec(path: Path, name: str, entry: Mapping[str, Any]) -> Spec:
    kind, shape = entry["dtype"], tuple(entry["shape"])
    if kind not in SAFETENSORS:
        raise CheckpointError(f"{path} holds {name} in dtype {kind}, which torch can't read")
    packed = NUMBERS_IN_AN_ELEMENT.get(kind, 1)
    if packed > 1 and shape:
        shape = (*shape[:-1], shape[-1] // packed)
    return Spec(shape, SAFETENSORS[kind])


def _offsets(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]] | None:
    """Return where each tensor begins in the whole one, as torch's distributed save notes it."""
    if "DCP_SHARDING_INFO" not in metadata:
        return None
    try:
        noted = json.loads(metadata["DCP_SHARDING_INFO"])
        return {name: tuple(map(int, entry["saved_offsets"])) for name, entry in noted.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _may_be_alias(key: str, name: str) -> bool:
    """Return whether a metadata key looks like the name of a tensor, unlike "format"."""
    return "." in key or key == name.rpartition(".")[2]


def _record(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the provenance record of a file; an empty one if it isn't sound."""
    try:
        record = json.loads(metadata.get(RECORD, "{}"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _open(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file that the safetensors library has checked, and where data begin.

    Nothing stays mapped: a file that then becomes shorter would end the process, without a word.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a sound safetensors file: {error}") from error
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(text, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise CheckpointError(f"{file} is not a sound safetensors file: {error}") from error
    return header, 8 + length


def recognises(path: Path) -> bool:
    """Return whether a file begins with a length and a JSON object of at most that length."""
    with open(path, "rb") as stream:
        head = stream.read(9)
    return (
        len(head) == 9
        and head[8:] == b"{"
        and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8
    )


def open_file(path: Path, key: str | None = None) -> Source:
    """Open a file; the tensors of a compressed task vector are decoded.

    Args:
        path: the file.
        key: for a file of several models, the task whose model to open.
    """
    source = SafetensorsSource(path)
    packed = packed_record(source.made_from)
    if packed is not None:
        return PackedSource(source, packed, key)
    if key is not None:
        raise CheckpointError(
            f"{path} holds one set of tensors, and so no key {key!r}", hint=f"name {path} alone"
        )
    if "compressed" in source.made_from:
        return CompressedSource(source, source.made_from)
    return source
