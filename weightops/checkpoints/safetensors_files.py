"""safetensors: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weightops.dtypes import SAFETENSORS
from weightops.errors import CheckpointError
from weightops.expression import Source, Spec

RECORD = "weightops"
"""The metadata key under which weightops writes what a file was made from."""


class SafetensorsSource(Source):
    """Tensors of one or several safetensors files, mapped from disk."""

    made_from: dict[str, Any]

    def __init__(self, files: list[Path], ref: str) -> None:
        self.ref = ref
        self.metadata: dict[str, str] = {}
        self.specs, self.ties, self._owner = {}, {}, {}
        stamps = []
        for file in files:
            stat = file.stat()
            stamps.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
            handle, header = _open(file)
            metadata = header.pop("__metadata__", None) or {}
            for name, entry in header.items():
                if name in self.specs:
                    raise CheckpointError(f"{file} holds {name}, which another shard holds too")
                if entry["dtype"] not in SAFETENSORS:
                    raise CheckpointError(f"{file} holds {name} in dtype {entry['dtype']}, which torch can't read")
                self.specs[name] = Spec(tuple(entry["shape"]), SAFETENSORS[entry["dtype"]])
                self._owner[name] = handle
            self.metadata |= metadata
        for alias, name in self.metadata.items():
            if name in self.specs and alias not in self.specs and alias not in ("format", RECORD):
                self.ties[alias] = name
        self.made_from = _record(self.metadata)
        self.space = "delta" if self.made_from.get("space") == "delta" else "weights"
        self.specs |= {alias: self.specs[name] for alias, name in self.ties.items()}
        self.identity = ("files", *stamps)

    specs: dict[str, Spec]
    ties: dict[str, str]
    _owner: dict[str, Any]

    def read(self, name: str) -> torch.Tensor:
        name = self.ties.get(name, name)
        tensor: torch.Tensor = self._owner[name].get_tensor(name)
        return tensor


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
    header: dict[str, Any] = json.loads(text, object_pairs_hook=partial(_distinct, file))
    return handle, header


def _distinct(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: of repeated ones, two readers may see different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise CheckpointError(f"{file} repeats the key {repeated[:80]!r}")
    return found


def recognises_file(path: Path) -> bool:
    """A length, then a JSON object."""
    with open(path, "rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def open_file(path: Path) -> Source:
    """One file."""
    return SafetensorsSource([path], str(path))


def recognises_index(path: Path) -> bool:
    """A JSON object with a ``weight_map``."""
    with open(path, "rb") as stream:
        if stream.read(1) != b"{":
            return False
    try:
        return bool(_read_index(path))
    except CheckpointError:
        return False


def open_index(path: Path) -> Source:
    """All shards of an index, which must lie beside it and hold what it says."""
    weight_map: Mapping[str, str] = _read_index(path)["weight_map"]
    files = []
    for shard in dict.fromkeys(weight_map.values()):
        if Path(shard).name != shard or "\0" in shard or len(shard) > 255:
            raise CheckpointError(f"{path} points to {shard[:80]!r}, outside its folder")
        file = path.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{path} lists {shard}, which is missing: the download or copy is incomplete")
        if file.resolve().parent not in (path.parent.resolve(), path.resolve().parent):
            raise CheckpointError(f"{path} points to {shard}, a link to {file.resolve()}, outside its folder")
        files.append(file)
    source = SafetensorsSource(files, str(path.parent))
    missing = [name for name in weight_map if name not in source.specs]
    if missing:
        raise CheckpointError(
            f"{path} lists {missing[0]} in {weight_map[missing[0]]}, which doesn't hold it ({len(missing)} such tensors)"
        )
    return source


def _read_index(path: Path) -> dict[str, dict[str, str]]:
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(_distinct, path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{path} is not an index of shards: it has no weight_map")
    return {"weight_map": shards}
