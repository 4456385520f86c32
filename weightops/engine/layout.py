"""Lay a form out in safetensors files, and estimate the cost of writing them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightops.algebra.dtypes import NUMBERS_IN_AN_ELEMENT, SAFETENSORS
from weightops.algebra.kernels import PIECE
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.source import Spec
from weightops.engine.plan import SEGMENT, plan, units
from weightops.engine.threads import threads_to_use
from weightops.errors import OptionError
from weightops.support.collector import uncollected

_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its header, and the offset in bytes of each tensor.

    Attributes:
        name: its place in the output's folder.
        header: its header.
        offsets: name of a tensor -> the byte at which its data begin.
        size: its bytes.
        prefix: the beginning of the tensors' names that the file leaves out.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int
    prefix: str = ""


@uncollected()
def layout(
    form: LinearForm,
    filename: str,
    metadata: Mapping[str, str],
    *,
    max_shard_size: int | None = None,
    prefix: str = "",
    aliases: bool = True,
) -> list[FileLayout]:
    """Lay a form out in one file, or in shards of at most ``max_shard_size`` bytes of tensors.

    Tied names are stored once. The metadata map each alias to the name that is stored, as
    ``safetensors.torch.save_model`` does.

    Args:
        form: the form.
        filename: the name of the file; shards are numbered.
        metadata: the metadata of each file.
        max_shard_size: the most bytes of tensors in a file.
        prefix: the beginning of all names, which the files leave out.
        aliases: store tied names once; or else under each name.

    Raises:
        OptionError: if a tensor has a dtype that safetensors lacks.
    """
    tied = tied_names(form) if aliases else {}
    cut = len(prefix)
    shards: list[dict[str, Spec]] = [{}]
    shard_bytes = 0
    for name, spec in form.specs.items():
        if name in tied:
            continue
        if spec.dtype_name not in _SAFETENSORS_NAMES:
            raise OptionError(f"{name} is {spec.dtype_name}, which safetensors can't hold")
        if max_shard_size and shards[-1] and shard_bytes + spec.nbytes > max_shard_size:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = spec
        shard_bytes += spec.nbytes
    if len(shards) == 1:
        tied_here = {alias[cut:]: name[cut:] for alias, name in tied.items()}
        return [_file(filename, shards[0], {**metadata, **tied_here}, prefix)]
    stem = filename.removesuffix(".safetensors")
    shard_of = {name: i for i, shard in enumerate(shards) for name in shard}
    of_shards: list[dict[str, str]] = [{} for _ in shards]
    for alias, name in tied.items():
        of_shards[shard_of[name]][alias[cut:]] = name[cut:]
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    return [
        _file(name, shard, {**metadata, **tied_here}, prefix)
        for name, shard, tied_here in zip(names, shards, of_shards, strict=True)
    ]


def _file(
    name: str, specs: Mapping[str, Spec], metadata: Mapping[str, str], prefix: str
) -> FileLayout:
    """Lay out one file, the tensors of the widest dtype first, so that all tensors are aligned."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for tensor in sorted(specs, key=lambda n: -specs[n].itemsize):
        spec = specs[tensor]
        kind, shape = _SAFETENSORS_NAMES[spec.dtype_name], list(spec.shape)
        if shape:
            shape[-1] *= NUMBERS_IN_AN_ELEMENT.get(kind, 1)
        place = {"dtype": kind, "shape": shape, "data_offsets": [end, end + spec.nbytes]}
        entries[tensor.removeprefix(prefix)] = place
        starts[tensor], end = end, end + spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {tensor: len(header) + start for tensor, start in starts.items()}
    return FileLayout(name, header, offsets, len(header) + end, prefix)


def has_header(path: Path, file: FileLayout) -> bool:
    """Return whether a file has the size and the header of a layout."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with open(path, "rb") as stream:
        return stream.read(len(file.header)) == file.header


@dataclass(frozen=True)
class Estimate:
    """The cost of writing a form, known from headers alone.

    Attributes:
        tensors: the number of tensors that are computed.
        files: the number of files that are written.
        bytes_read: bytes of the inputs, each tensor counted once.
        bytes_written: bytes of the files, headers included.
        peak_memory: an upper bound of the bytes of buffers, without those of Python and torch.
        free_disk: free bytes where the output will be.
    """

    tensors: int
    files: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    free_disk: int


def estimate(form: LinearForm, files: list[FileLayout], place: Path) -> Estimate:
    """Estimate the cost of writing the files of a form to ``place``."""
    steps = plan(form, [name for file in files for name in file.offsets])
    inputs = {(leaf, s.name) for s in steps for source in s.coefficients for leaf in source.leaves}
    threads = min(threads_to_use(), len(units(steps)))
    segment_bytes = 4 * max((min(step.numel, SEGMENT) for step in steps), default=0)
    chunk_bytes = 3 * 4 * PIECE
    working_bytes = sorted(
        (sum(s.working_bytes(step.name) for s in step.coefficients) for step in steps), reverse=True
    )
    parent = next(path for path in place.absolute().parents if path.exists())
    return Estimate(
        tensors=len(steps),
        files=len(files),
        bytes_read=sum(leaf.specs[n].nbytes for leaf, n in inputs if n in leaf.specs),
        bytes_written=sum(file.size for file in files),
        peak_memory=threads * (segment_bytes + chunk_bytes) + sum(working_bytes[:threads]),
        free_disk=shutil.disk_usage(parent).free,
    )
