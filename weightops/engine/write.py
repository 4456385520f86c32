"""Stream a form into safetensors files whose layout is known before a byte of data is read."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from weightops.algebra.dtypes import SAFETENSORS, name_of
from weightops.algebra.kernels import CHUNK, has_nonfinite
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.scratch import Scratch, Slot
from weightops.algebra.source import Spec
from weightops.engine.evaluate import OnNonfinite, evaluate, parallel, report_nonfinite
from weightops.engine.plan import SEGMENT, Segment, plan, units
from weightops.engine.ranks import Ranks
from weightops.errors import OptionError, OutputError

ALONE = Ranks()
_JOURNAL = "journal."
_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its header, and where each tensor's bytes begin."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def layout(
    form: LinearForm,
    filename: str,
    metadata: Mapping[str, str],
    *,
    max_shard_size: int | None = None,
) -> list[FileLayout]:
    """Lay a form out in one file, or in shards of at most ``max_shard_size`` bytes of tensors.

    Tied names are stored once; the metadata say which name stands for which, as ``safetensors.torch.save_model`` does.

    Raises:
        OptionError: if a tensor has a dtype that safetensors lacks.
    """
    tied = tied_names(form)
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in form.specs.items():
        if name in tied:
            continue
        if spec.dtype not in _NAMES:
            raise OptionError(f"{name} is {name_of(spec.dtype)}, which safetensors can't hold")
        if (
            max_shard_size
            and shards[-1]
            and sum(s.nbytes for s in shards[-1].values()) + spec.nbytes > max_shard_size
        ):
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
    for tensor in sorted(
        specs, key=lambda n: -specs[n].dtype.itemsize
    ):  # widest first: all are aligned
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
    return FileLayout(
        name, text, {n: len(text) + start for n, start in offsets.items()}, len(text) + end
    )


@dataclass(frozen=True)
class Estimate:
    """What writing a form takes, known from headers alone.

    Attributes:
        tensors: how many are computed.
        files: how many are written.
        bytes_read: of the inputs, each tensor once.
        bytes_written: headers included.
        peak_memory: at most so many bytes of buffers, beside what Python and torch take.
        free_disk: bytes where the output is to be.
    """

    tensors: int
    files: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    free_disk: int


def estimate(form: LinearForm, files: list[FileLayout], place: Path) -> Estimate:
    """What `write` would take in a folder at ``place``."""
    steps = plan(form, [name for file in files for name in file.offsets])
    leaves = {(leaf, s.name) for s in steps for source in s.coefficients for leaf in source.leaves}
    read = sum(leaf.specs[name].nbytes for leaf, name in leaves if name in leaf.specs)
    threads = min(torch.get_num_threads(), len(units(steps)))
    segment = max((min(step.numel, SEGMENT) for step in steps), default=0) * 4
    working = sorted(
        (sum(s.working_bytes(step.name) for s in step.coefficients) for step in steps), reverse=True
    )
    parent = next(p for p in place.absolute().parents if p.exists())
    return Estimate(
        len(steps),
        len(files),
        read,
        sum(file.size for file in files),
        threads * (segment + 3 * 4 * CHUNK) + sum(working[:threads]),
        shutil.disk_usage(parent).free,
    )


def write(
    form: LinearForm,
    folder: Path,
    files: list[FileLayout],
    *,
    on_nonfinite: OnNonfinite = "warn",
    ranks: Ranks = ALONE,
    device: torch.device | None = None,
) -> None:
    """Fill the files of a layout, in ``folder``, from a form; what a journal there says is done isn't done again.

    Args:
        form: what to evaluate.
        folder: where.
        files: the layout.
        on_nonfinite: what to do about NaN and Inf in the result.
        ranks: the processes that share the work, each with the same form, folder and files.
        device: where to compute; on CPU by default.

    Raises:
        OSError: if the disk is full, before any data is written where the system can tell.
        OutputError: if the folder holds the journal of another job.
        NonfiniteError: naming the tensors, if asked for.
    """
    steps = plan(form, [name for file in files for name in file.offsets])
    work = units(steps)
    key = _key(files, device)
    if ranks.first:
        _prepare(folder, files, key)
    ranks.wait()
    finished = {line["unit"]: line["nonfinite"] for line in _journals(folder, key)}
    handles = {file.name: os.open(folder / file.name, os.O_WRONLY) for file in files}
    place = {
        name: (handles[file.name], offset)
        for file in files
        for name, offset in file.offsets.items()
    }

    def do(unit: list[Segment], scratch: Scratch) -> list[str]:
        def target(segment: Segment) -> torch.Tensor:
            return scratch.get(Slot.RESULT, segment.stop - segment.start, form.specs[segment.step.name].dtype)

        bad = []
        for segment, out in evaluate(unit, target, scratch):
            name = segment.step.name
            if on_nonfinite != "ignore" and has_nonfinite(out):
                bad.append(name)
            handle, offset = place[name]
            _pwrite(
                handle,
                out.cpu().view(torch.uint8).numpy().data,
                offset + segment.start * out.element_size(),
            )
        return bad

    mine = [i for i in ranks.share(work) if i not in finished]
    try:
        with open(
            folder / f"{_JOURNAL}{ranks.index}.{secrets.token_hex(4)}", "w", encoding="utf-8"
        ) as journal:

            def sync(lines: list[str]) -> None:
                for handle in handles.values():
                    os.fsync(handle)  # data before the line that says it is there
                journal.writelines(lines)
                journal.flush()
                os.fsync(journal.fileno())

            journal.write(key + "\n")
            lines: list[str] = []
            with ThreadPoolExecutor(1) as beside:  # the disk works while the processor does
                syncing = beside.submit(sync, [])
                for i, bad in zip(
                    mine, parallel([work[i] for i in mine], do, device=device), strict=True
                ):
                    lines.append(json.dumps({"unit": i, "nonfinite": bad}) + "\n")
                    if syncing.done():
                        syncing.result()
                        syncing, lines = beside.submit(sync, lines), []
                syncing.result()
            sync(lines)
    finally:
        for handle in handles.values():
            os.close(handle)
    ranks.wait()
    if ranks.first:
        finished = {line["unit"]: line["nonfinite"] for line in _journals(folder, key)}
        if len(finished) != len(work):
            raise OutputError(
                f"{len(work) - len(finished)} of {len(work)} parts of {folder} were not written"
            )
        report_nonfinite((name for i in sorted(finished) for name in finished[i]), on_nonfinite)
        _write_index(folder, files)
        for path in folder.glob(f"{_JOURNAL}*"):
            path.unlink()


def _key(files: list[FileLayout], device: torch.device | None) -> str:
    """What a job is told by: the headers, which hold the layout, and in their metadata the expression and its inputs; and the device."""
    digest = sha256(device.type.encode() if device else b"cpu")
    for file in files:
        digest.update(file.name.encode() + file.header)
    return digest.hexdigest()


def _prepare(folder: Path, files: list[FileLayout], key: str) -> None:
    """Headers in files of their final size; what an earlier process of the same job wrote is left."""
    begun = any(folder.glob(f"{_JOURNAL}*"))
    if begun and any(
        path.read_text(encoding="utf-8").partition("\n")[0] not in (key, "")
        for path in folder.glob(f"{_JOURNAL}*")
    ):
        raise OutputError(
            f"{folder} holds what another job left (other inputs, options or layout); without resume it is cleared"
        )
    for file in files:
        handle = os.open(
            folder / file.name, os.O_CREAT | os.O_WRONLY | (0 if begun else os.O_TRUNC), 0o644
        )
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, file.size)
            os.pwrite(handle, file.header, 0)
        finally:
            os.close(handle)
    (folder / f"{_JOURNAL}begun").write_text(key + "\n", encoding="utf-8")


def _journals(folder: Path, key: str) -> Iterator[dict[str, Any]]:
    """What the processes of a job have finished. A line that was cut short by a kill doesn't count."""
    for path in folder.glob(f"{_JOURNAL}*"):
        head, *lines = path.read_text(encoding="utf-8").split("\n")
        for line in lines[:-1] if head == key else ():
            yield json.loads(line)


def _write_index(folder: Path, files: list[FileLayout]) -> None:
    if len(files) > 1:
        total = sum(file.size - len(file.header) for file in files)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file.name for file in files for name in file.offsets},
        }
        stem = files[0].name.partition("-00001-of-")[0]
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _pwrite(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
