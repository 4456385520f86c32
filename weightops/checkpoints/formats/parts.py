"""Parts of tensors in safetensors files, one for each process of a distributed save by torch.

``HuggingFaceStorageWriter(save_distributed=True)`` writes ``shard-00001-model-00001-of-00001``:
rows under the whole tensor's name, and in the metadata the offset at which they begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightops.algebra.source import Source, Spec
from weightops.checkpoints.formats import safetensors
from weightops.checkpoints.formats.distributed import Chunk, check_boxes
from weightops.checkpoints.formats.safetensors import SafetensorsSource
from weightops.errors import CheckpointError
from weightops.support.json_files import read_json
from weightops.support.lazy import torch
from weightops.support.sibling_files import sibling

_INDEX = "model.safetensors.index.json"


def _is_part(source: SafetensorsSource, path: Path) -> bool:
    offsets = source.offsets
    if offsets is None:
        return False
    return path.name.startswith("shard-") or any(any(begin) for begin in offsets.values())


def open_parts(files: Sequence[Path]) -> Source | None:
    """Open the files that hold one process's part of tensors, and not whole ones; None for none.

    Raises:
        CheckpointError: if the parts of a tensor don't fill it.
    """
    opened = {path: SafetensorsSource(path) for path in files if safetensors.recognises(path)}
    held = {path: source for path, source in opened.items() if _is_part(source, path)}
    return PartsSource(held) if held else None


def open_whole(path: Path, key: str | None = None) -> Source:
    """Open a safetensors file that holds whole tensors; see `safetensors.open_file`.

    Raises:
        CheckpointError: if it is one process's part of a distributed save.
    """
    source = safetensors.open_file(path, key)
    if not isinstance(source, SafetensorsSource) or source.offsets is None:
        return source
    if _is_part(source, path):
        raise CheckpointError(
            f"{path} is one process's part of a distributed save: its tensors are some rows each",
            hint=f"open the folder {path.parent} with the parts of all processes",
        )
    index = path.parent / _INDEX
    if index.is_file():
        content = read_json(index)
        listed = content.get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else set()
        check_claim(content, [SafetensorsSource(sibling(index, name)) for name in sorted(names)])
    return source


def check_claim(index: Mapping[str, Any], sources: Sequence[Source]) -> None:
    """Check that the files of a distributed save hold the bytes that its index claims.

    By default torch's writer leaves the part of its first process, and an index of all parts.

    Raises:
        CheckpointError: if they don't.
    """
    noted = index.get("metadata")
    claimed = noted.get("total_size") if isinstance(noted, dict) else None
    by_torch = [s for s in sources if isinstance(s, SafetensorsSource) and s.offsets is not None]
    held = sum(spec.nbytes for source in sources for spec in source.specs.values())
    if by_torch and isinstance(claimed, int) and claimed > held:
        raise CheckpointError(
            f"{Path(by_torch[0].ref).parent} holds {held:,} bytes of tensors, and its index claims "
            f"{claimed:,}: it is the part of one process, as torch's HuggingFaceStorageWriter "
            "leaves it of sharded tensors",
            hint="save with save_distributed=True, or a full state dict "
            "(get_model_state_dict with full_state_dict=True)",
        )


class PartsSource(Source):
    """Tensors that are put together from the parts of several processes when they are read.

    Args:
        sources: the files of all processes.

    Raises:
        CheckpointError: if the parts of a tensor don't fill it.
    """

    computed = True

    def __init__(self, sources: Mapping[Path, SafetensorsSource]) -> None:
        self.ref = str(next(iter(sources)).parent)
        self._sources = sources
        self._chunks: dict[str, dict[tuple[int, ...], Chunk]] = {}
        dtypes: dict[str, str] = {}
        for file, source in self._sources.items():
            for name, spec in source.specs.items():
                begin = (source.offsets or {}).get(name, (0,) * len(spec.shape))
                chunk = Chunk(begin, spec.shape, file, 0, spec.nbytes)
                self._chunks.setdefault(name, {}).setdefault(begin, chunk)
                if dtypes.setdefault(name, spec.dtype_name) != spec.dtype_name:
                    raise CheckpointError(f"the parts of {name} in {self.ref} differ in dtype")
        self.specs = {
            name: Spec(_whole(list(chunks.values())), dtypes[name])
            for name, chunks in self._chunks.items()
        }
        for name, chunks in self._chunks.items():
            check_boxes(name, self.specs[name], list(chunks.values()))
        self.ties = {}
        self.identity = ("parts", *(source.identity for source in self._sources.values()))
        self.files = [file for source in self._sources.values() for file in source.files]

    def read(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        for chunk in self._chunks[name].values():
            tensor[chunk.slices] = self._sources[chunk.file].read(name)
        return tensor

    def working_bytes(self, name: str) -> int:
        return self.specs[name].nbytes


def _whole(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    """Return the shape that the parts of a tensor reach to."""
    ends = [[o + s for o, s in zip(c.offsets, c.sizes, strict=True)] for c in chunks]
    return tuple(max(end) for end in zip(*ends, strict=True))
