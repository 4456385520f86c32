"""safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weightops.algebra.dtypes import SAFETENSORS
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.formats.compressed import CompressedSource
from weightops.errors import CheckpointError
from weightops.support.json_files import unique_keys

RECORD = "weightops"
"""The metadata key under which weightops writes what a file was made from."""


class SafetensorsSource(Source):
    """Tensors of one safetensors file, mapped from disk."""

    def __init__(self, path: Path) -> None:
        self.ref = str(path)
        stat = path.stat()
        self.identity = ("file", stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        self._file, header = _open(path)
        self._mapped: dict[str, torch.Tensor] = {}
        metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        stored = {}
        for name, entry in header.items():
            if entry["dtype"] not in SAFETENSORS:
                raise CheckpointError(
                    f"{path} holds {name} in dtype {entry['dtype']}, which torch can't read"
                )
            stored[name] = Spec(tuple(entry["shape"]), SAFETENSORS[entry["dtype"]])
        self.ties = {
            alias: name
            for alias, name in metadata.items()
            if name in stored
            and alias not in stored
            and ("." in alias or alias.rpartition(".")[2] == name.rpartition(".")[2])
        }
        self.specs = {**stored, **{alias: stored[name] for alias, name in self.ties.items()}}
        self.made_from = _record(metadata)
        self.space = "delta" if self.made_from.get("space") == "delta" else "weights"

    def read(self, name: str) -> torch.Tensor:
        name = self.ties.get(name, name)
        if (
            name not in self._mapped
        ):  # a view of the mapped file, which costs more to make than to keep
            with torch.inference_mode(False):
                self._mapped[name] = self._file.get_tensor(name)
        return self._mapped[name]


def _record(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What weightops wrote about the file; nothing if that isn't sound."""
    try:
        record = json.loads(metadata.get(RECORD, "{}"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _open(file: Path) -> tuple[Any, dict[str, Any]]:
    """A mapped file, its header checked by the safetensors library, and the header itself."""
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a sound safetensors file: {error}") from error
    with open(file, "rb") as stream:
        text = stream.read(int.from_bytes(stream.read(8), "little"))
    try:
        header: dict[str, Any] = json.loads(text, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise CheckpointError(f"{file} is not a sound safetensors file: {error}") from error
    return handle, header


def recognises(path: Path) -> bool:
    """A length, then a JSON object."""
    with open(path, "rb") as stream:
        head = stream.read(9)
    return (
        len(head) == 9
        and head[8:] == b"{"
        and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8
    )


def open_file(path: Path) -> Source:
    """One file; a compressed task vector gives its tensors as they were."""
    source = SafetensorsSource(path)
    return (
        CompressedSource(source, source.made_from) if "compressed" in source.made_from else source
    )
