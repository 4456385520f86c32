"""safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightops.algebra.source import Source, read_flat
from weightops.checkpoints.formats.compressed import CompressedSource
from weightops.checkpoints.formats.file_source import Extent, FileSource
from weightops.checkpoints.formats.packed import PackedSource, packed_record
from weightops.checkpoints.formats.safetensors_header import read_header
from weightops.errors import CheckpointError
from weightops.support.input_files import InputFile
from weightops.support.json_files import parse_json
from weightops.support.lazy import torch

RECORD = "weightops"
"""The metadata key of the provenance record that weightops writes."""

MODEL_SPEC = "modelspec."
"""The beginning of the metadata keys that describe a model for people (ModelSpec)."""


class SafetensorsSource(FileSource):
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
        stored, self._extents, metadata = read_header(path)
        self.metadata = metadata
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
        spec, [file] = self.specs[name], self.files
        flat = read_flat(file, self.extent(name).start, spec.numel, spec.dtype)
        return flat.reshape(spec.shape)

    def extent(self, name: str) -> Extent:
        return self._extents[self.ties.get(name, name)]


def _offsets(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]] | None:
    """Return where each tensor begins in the whole one, as torch's distributed save notes it."""
    if "DCP_SHARDING_INFO" not in metadata:
        return None
    try:
        noted = parse_json(metadata["DCP_SHARDING_INFO"])
        return {name: tuple(map(int, entry["saved_offsets"])) for name, entry in noted.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return {}


def _may_be_alias(key: str, name: str) -> bool:
    """Return whether a metadata key looks like the name of a tensor, unlike "format"."""
    return "." in key or key == name.rpartition(".")[2]


def _record(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the provenance record of a file; an empty one if it isn't sound."""
    try:
        record = parse_json(metadata.get(RECORD, "{}"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


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
