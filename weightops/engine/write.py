"""Stream a form into safetensors files whose layout is known before a byte of data is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from weightops.dtypes import SAFETENSORS, name_of
from weightops.engine.run import OnNonfinite, Segment, evaluate, parallel, plan, report_nonfinite, units
from weightops.errors import OptionError
from weightops.expression import LinearForm, Spec, ties
from weightops.kernels import Scratch, has_nonfinite

_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its header, and where each tensor's bytes begin."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def layout(
    form: LinearForm, filename: str, metadata: Mapping[str, str], *, max_shard_size: int | None = None
) -> list[FileLayout]:
    """Lay a form out in one file, or in shards of at most ``max_shard_size`` bytes of tensors.

    Tied names are stored once; the metadata say which name stands for which, as ``safetensors.torch.save_model`` does.

    Raises:
        OptionError: if a tensor has a dtype that safetensors lacks.
    """
    tied = ties(form)
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in form.specs.items():
        if name in tied:
            continue
        if spec.dtype not in _NAMES:
            raise OptionError(f"{name} is {name_of(spec.dtype)}, which safetensors can't hold")
        if max_shard_size and shards[-1] and sum(s.nbytes for s in shards[-1].values()) + spec.nbytes > max_shard_size:
            shards.append({})
        shards[-1][name] = spec
    if len(shards) == 1:
        return [_file(filename, shards[0], {**metadata, **tied})]
    stem = filename.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    return [
        _file(name, shard, {**metadata, **{a: n for a, n in tied.items() if n in shard}})
        for name, shard in zip(names, shards, strict=True)
    ]


def _file(name: str, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> FileLayout:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for tensor in sorted(specs, key=lambda n: -specs[n].dtype.itemsize):  # widest first: all are aligned
        spec = specs[tensor]
        header[tensor] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        offsets[tensor], end = end, end + spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    return FileLayout(name, text, {n: len(text) + start for n, start in offsets.items()}, len(text) + end)


def write(form: LinearForm, folder: Path, files: list[FileLayout], *, on_nonfinite: OnNonfinite = "warn") -> None:
    """Fill the files of a layout, in ``folder``, from a form.

    Raises:
        OSError: if the disk is full, before any data is written where the system can tell.
        NonfiniteError: naming the tensors, if asked for.
    """
    handles: dict[str, int] = {}
    try:
        place: dict[str, tuple[int, int]] = {}
        for file in files:
            handle = handles[file.name] = os.open(folder / file.name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, file.size)
            os.pwrite(handle, file.header, 0)
            place |= {name: (handle, offset) for name, offset in file.offsets.items()}

        def do(unit: list[Segment], scratch: Scratch) -> list[str]:
            bad = []
            for segment, out in evaluate(unit, target, scratch):
                name = segment.step.name
                if on_nonfinite != "ignore" and has_nonfinite(out):
                    bad.append(name)
                handle, offset = place[name]
                _pwrite(handle, out.view(torch.uint8).numpy().data, offset + segment.start * out.element_size())
            return bad

        def target(segment: Segment) -> torch.Tensor:
            return torch.empty(segment.stop - segment.start, dtype=form.specs[segment.step.name].dtype)

        found = [name for bad in parallel(units(plan(form, place)), do) for name in bad]
        report_nonfinite(found, on_nonfinite)
    finally:
        for handle in handles.values():
            os.close(handle)
    if len(files) > 1:
        total = sum(file.size - len(file.header) for file in files)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file.name for file in files for name in file.offsets},
        }
        stem = files[0].name.partition("-00001-of-")[0]
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _pwrite(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
