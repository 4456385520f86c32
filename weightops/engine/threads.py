"""Run units of work on a pool of threads, with a progress bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from threading import RLock, local
from typing import TypeVar

from weightops.algebra.scratch import Scratch
from weightops.engine.plan import Segment, unit_numel
from weightops.support.allocator import keep_freed_memory
from weightops.support.input_files import InputFile, forget, given_back, held_open, outgrow_memory
from weightops.support.lazy import torch
from weightops.support.progress import progress

T = TypeVar("T")

_torch_threads_lock = RLock()


def threads_to_use() -> int:
    """Return how many threads torch uses, or may use at most while it isn't imported."""
    if "torch" in sys.modules:
        return torch.get_num_threads()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else os.cpu_count() or 1


@cache
def _torch_threads() -> int:
    """Return the threads that torch had before the first pool, whose threads have one each."""
    return torch.get_num_threads()


def parallel(
    work: Sequence[list[Segment]],
    do: Callable[[list[Segment], Scratch], T],
    *,
    files: Sequence[InputFile] = (),
    threads: int | None = None,
    device: torch.device | None = None,
) -> Generator[T, None, None]:
    """Yield the result of ``do`` for each unit, in order.

    One thread is the caller's own, in which torch may use all its threads; each of several threads
    computes alone. A progress bar appears after a second.

    Args:
        work: the units.
        do: computes a unit, in the buffers of its thread.
        files: what is read. Where it outgrows the memory, the system's cache keeps none of it.
        threads: how many threads; by default as many as torch uses.
        device: where to compute; on CPU by default.
    """
    _torch_threads()
    inference = torch.is_inference_mode_enabled()  # threads don't inherit it
    large = {*files} if outgrow_memory(files) else set()
    reading: Callable[[], AbstractContextManager[None]] = given_back if large else nullcontext
    of_thread = local()

    def run(unit: list[Segment]) -> T:
        if not hasattr(of_thread, "scratch"):
            of_thread.scratch = Scratch(device or "cpu")
        with torch.inference_mode(inference), reading():
            return do(unit, of_thread.scratch)

    total_bytes = 4 * sum(map(unit_numel, work))  # roughly: as if all were float32
    with (
        _pool(min(threads or torch.get_num_threads(), len(work))) as pool,
        _highest_precision(),
        held_open(),
        progress(total_bytes, "", "B") as bar,
    ):
        results = pool.map(run, work) if pool else map(run, work)
        for unit, result in zip(work, results, strict=True):
            bar.update(4 * unit_numel(unit))
            yield result
        for file in large:
            forget(file, 0, file.size)


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Start a pool of several threads in which torch uses one thread each; None for one thread."""
    if threads <= 1:
        yield None
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or ^C, no further unit is begun
        torch.set_num_threads(before)


@contextmanager
def _highest_precision() -> Iterator[None]:
    """Multiply matrices in full float32, whatever the caller chose for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def all_torch_threads() -> Iterator[None]:
    """Let one thread at a time use all threads that torch has.

    Computations that hold whole tensors take turns in this way, which bounds their memory. What one
    of them frees the next one takes: new pages of the system would cost more than the arithmetic.
    """
    keep_freed_memory()
    with _torch_threads_lock:
        before = torch.get_num_threads()
        torch.set_num_threads(_torch_threads())
        try:
            yield
        finally:
            torch.set_num_threads(before)
