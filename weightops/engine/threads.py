"""Run units of work on a pool of threads, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import RLock, local
from typing import TypeVar

import torch

from weightops.algebra.scratch import Scratch
from weightops.engine.plan import Segment, unit_numel
from weightops.support.input_files import held_open
from weightops.support.progress import progress

T = TypeVar("T")

_TORCH_THREADS = torch.get_num_threads()
_torch_threads_lock = RLock()


def parallel(
    work: Sequence[list[Segment]],
    do: Callable[[list[Segment], Scratch], T],
    *,
    threads: int | None = None,
    device: torch.device | None = None,
) -> Generator[T, None, None]:
    """Yield the result of ``do`` for each unit, in order.

    One thread is the caller's own, in which torch may use all its threads; each of several threads
    computes alone. A progress bar appears after a second.

    Args:
        work: the units.
        do: computes a unit, in the buffers of its thread.
        threads: how many threads; by default as many as torch uses.
        device: where to compute; on CPU by default.
    """
    inference = torch.is_inference_mode_enabled()  # threads don't inherit it
    of_thread = local()

    def run(unit: list[Segment]) -> T:
        if not hasattr(of_thread, "scratch"):
            of_thread.scratch = Scratch(device or "cpu")
        with torch.inference_mode(inference):
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

    Computations that hold whole tensors take turns in this way, which bounds their memory.
    """
    with _torch_threads_lock:
        before = torch.get_num_threads()
        torch.set_num_threads(_TORCH_THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(before)
