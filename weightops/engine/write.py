"""Write a form into safetensors files whose layout is known before any tensor is read.

The units of the plan are evaluated in parallel, and each segment is written at its offset. A
journal in the output's folder lists the units whose data are on the disk, so that a job that was
killed can resume with the other units. Several processes can share one job.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from hashlib import sha256
from pathlib import Path

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.scratch import Scratch, Slot
from weightops.engine.evaluate import OnNonfinite, evaluate, flawed, report_nonfinite
from weightops.engine.layout import FileLayout
from weightops.engine.plan import Segment, joined, plan, units
from weightops.engine.ranks import ONE_RANK, Ranks
from weightops.engine.threads import parallel
from weightops.errors import CheckpointError, OutputError
from weightops.support.collector import uncollected
from weightops.support.input_files import InputFile, check_unchanged, outgrow_memory
from weightops.support.lazy import torch

_JOURNAL = "journal."

_PARTITION = b"3"
"""The version of how a job is divided into units, which a journal counts."""


def write(
    form: LinearForm,
    folder: Path,
    files: list[FileLayout],
    *,
    on_nonfinite: OnNonfinite = "warn",
    ranks: Ranks = ONE_RANK,
    device: torch.device | None = None,
) -> None:
    """Fill the files of a layout from a form, without the units that a journal there lists.

    Args:
        form: the form to evaluate.
        folder: the folder to write the files to.
        files: the layout of the form.
        on_nonfinite: what to do about NaN and Inf in the result: "ignore", "warn" or "error".
        ranks: the processes that share the work, each with the same form, folder and files.
        device: where to compute; on CPU by default.

    Raises:
        OSError: if the disk is full, before any data is written where the system can tell.
        OutputError: if the folder holds the journal of another job.
        CheckpointError: if an input changed meanwhile; the files are removed.
        NonfiniteError: naming the tensors, if ``on_nonfinite="error"``.
    """
    work = _divided(form, files)
    inputs = form.files
    key = _job_key(files, inputs, device)
    if ranks.first:
        _prepare(folder, files, key)
    ranks.wait()
    finished = _finished_units(folder, key)
    remaining = [i for i in ranks.share(work) if i not in finished]
    journal = folder / f"{_JOURNAL}{ranks.index}.{secrets.token_hex(4)}"
    with _nothing_kept_of_changed_inputs(inputs, folder, files):
        with _open_all(folder, files) as handles:
            do = _unit_writer(form, files, handles, on_nonfinite)
            results = parallel([work[i] for i in remaining], do, files=inputs, device=device)
            with closing(results):
                numbered = zip(remaining, results, strict=True)
                _record(journal, key, numbered, handles, cached=not outgrow_memory(inputs))
        ranks.wait()
    if ranks.first:
        finished = _finished_units(folder, key)
        if len(finished) != len(work):
            missing = len(work) - len(finished)
            raise OutputError(f"{missing} of {len(work)} parts of {folder} were not written")
        report_nonfinite((name for i in sorted(finished) for name in finished[i]), on_nonfinite)
        _write_indexes(folder, files)
        for path in folder.glob(f"{_JOURNAL}*"):
            path.unlink()


@uncollected()
def _divided(form: LinearForm, files: list[FileLayout]) -> list[list[Segment]]:
    """Return the units of a job. What is joined is neighbours in a file, and written at once."""
    return units(step for file in files for step in joined(plan(form, file.offsets), form.specs))


@contextmanager
def _nothing_kept_of_changed_inputs(
    inputs: Sequence[InputFile], folder: Path, files: list[FileLayout]
) -> Iterator[None]:
    """Check that no input changed in the meantime, and remove the files if one did."""
    try:
        yield
        check_unchanged(inputs)
    except CheckpointError:
        for path in [*folder.glob(f"{_JOURNAL}*"), *(folder / file.name for file in files)]:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _open_all(folder: Path, files: list[FileLayout]) -> Iterator[list[int]]:
    with ExitStack() as opened:
        handles = []
        for file in files:
            handles.append(os.open(folder / file.name, os.O_WRONLY))
            opened.callback(os.close, handles[-1])
        yield handles


def _unit_writer(
    form: LinearForm, files: list[FileLayout], handles: list[int], on_nonfinite: OnNonfinite
) -> Callable[[list[Segment], Scratch], list[str]]:
    """Return a function that writes a unit and returns the names of tensors with NaN or Inf."""
    places = {
        name: (handle, offset)
        for file, handle in zip(files, handles, strict=True)
        for name, offset in file.offsets.items()
    }

    def do(unit: list[Segment], scratch: Scratch) -> list[str]:
        def target(segment: Segment) -> torch.Tensor:
            dtype = form.specs[segment.step.name].dtype
            return scratch.get(Slot.RESULT, segment.stop - segment.start, dtype)

        nonfinite = []
        for segment, out in evaluate(unit, target, scratch):
            if on_nonfinite != "ignore":
                nonfinite += flawed(segment, out)
            handle, offset = places[segment.step.name]
            data = out.cpu().view(torch.uint8).numpy().data
            _pwrite(handle, data, offset + segment.start * out.element_size())
        return nonfinite

    return do


def _record(
    path: Path,
    key: str,
    results: Iterator[tuple[int, list[str]]],
    handles: Sequence[int],
    *,
    cached: bool,
) -> None:
    """List units in a journal as they are written, after their data have been flushed to the disk.

    A thread of its own waits for the disk, while the processor computes the next units. The
    system's cache needn't keep what isn't `cached`.
    """
    with open(path, "w", encoding="utf-8") as journal:

        def flush(lines: list[str]) -> None:
            for handle in handles:
                os.fsync(handle)
                if not cached:
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            journal.writelines(lines)
            journal.flush()
            os.fsync(journal.fileno())

        journal.write(key + "\n")
        lines: list[str] = []
        with ThreadPoolExecutor(1) as flusher:
            flushing = flusher.submit(flush, [])
            for i, nonfinite in results:
                lines.append(json.dumps({"unit": i, "nonfinite": nonfinite}) + "\n")
                if flushing.done():
                    flushing.result()
                    flushing, lines = flusher.submit(flush, lines), []
            flushing.result()
        flush(lines)


def _job_key(
    files: list[FileLayout], inputs: Sequence[InputFile], device: torch.device | None
) -> str:
    """Return a digest of the device, the inputs' states, and the headers with the expression."""
    digest = sha256(_PARTITION + (device.type.encode() if device else b"cpu"))
    digest.update(repr([file.state for file in inputs]).encode())
    for file in files:
        digest.update(file.name.encode() + file.header)
    return digest.hexdigest()


def _prepare(folder: Path, files: list[FileLayout], key: str) -> None:
    """Create the files in their final sizes, with headers; keep the data of an earlier process.

    Raises:
        OutputError: if the folder holds the journal of another job.
    """
    journals = list(folder.glob(f"{_JOURNAL}*"))
    keys = {path.read_text(encoding="utf-8").partition("\n")[0] for path in journals}
    if not keys <= {key, ""}:
        raise OutputError(
            f"{folder} holds what another job left, of other inputs, options or layout",
            hint="without resume=True, it is cleared and the job begins again",
        )
    for file in files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_WRONLY | (0 if journals else os.O_TRUNC)
        handle = os.open(folder / file.name, flags, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, file.size)
            os.pwrite(handle, file.header, 0)
        finally:
            os.close(handle)
    (folder / f"{_JOURNAL}begun").write_text(key + "\n", encoding="utf-8")


def _finished_units(folder: Path, key: str) -> dict[int, list[str]]:
    """Return unit -> its tensors with NaN or Inf, from all journals of a job."""
    finished: dict[int, list[str]] = {}
    for path in folder.glob(f"{_JOURNAL}*"):
        journal_key, *lines = path.read_text(encoding="utf-8").split("\n")
        for line in lines[:-1] if journal_key == key else ():  # a kill may have cut the last line
            entry = json.loads(line)
            finished[entry["unit"]] = entry["nonfinite"]
    return finished


def _write_indexes(folder: Path, files: list[FileLayout]) -> None:
    """Write an index of the files of each part that has several."""
    parts: dict[str, list[FileLayout]] = {}
    for file in files:
        parts.setdefault(file.prefix, []).append(file)
    for prefix, shards in parts.items():
        if len(shards) == 1:
            continue
        index = {
            "metadata": {"total_size": sum(file.size - len(file.header) for file in shards)},
            "weight_map": {
                name.removeprefix(prefix): Path(file.name).name
                for file in shards
                for name in file.offsets
            },
        }
        path = folder / f"{shards[0].name.partition('-00001-of-')[0]}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _pwrite(handle: int, data: memoryview, offset: int) -> None:
    """Write all the data at an offset."""
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
