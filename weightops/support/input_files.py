"""Files that are read while a job lasts: they must stay as they were when they were opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock, local
from typing import NamedTuple

from weightops.errors import CheckpointError
from weightops.support.text import first_few


class InputFile(NamedTuple):
    """A file, and its state when it was opened.

    Attributes:
        path: the file.
        inode: its number in its file system.
        size: its bytes.
        modified: its time of modification in nanoseconds.
    """

    path: Path
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> InputFile:
        """Return a file in its present state."""
        state = path.stat()
        return cls(path.absolute(), state.st_ino, state.st_size, state.st_mtime_ns)

    @property
    def state(self) -> tuple[int, int, int]:
        """The state, without the path."""
        return self.inode, self.size, self.modified

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from an offset on; see `read_ranges`."""
        self.read_ranges([(buffer, offset)])

    def read_ranges(self, ranges: Iterable[tuple[memoryview, int]]) -> None:
        """Fill buffers, each from an offset on.

        A file that is mapped and becomes shorter would end the process, without a word.

        Raises:
            CheckpointError: if the file isn't what it was, or ends before a buffer is full.
        """
        try:
            handle = _held(self) if _jobs else _Handle(self)
            state = os.fstat(handle.number)
            if (state.st_ino, state.st_size, state.st_mtime_ns) != self.state:
                raise changed_error([self])
            for buffer, offset in ranges:
                if _thread.reads is not None:
                    _thread.reads.append(_Range(self, offset, offset + len(buffer)))
                while buffer:
                    count = os.preadv(handle.number, [buffer], offset)
                    if not count:
                        raise changed_error([self])
                    buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be read: {error.strerror}") from error


class _Handle:
    """A file that is open until nothing refers to this."""

    def __init__(self, file: InputFile) -> None:
        self.number = -1
        self.number = os.open(file.path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


_held = lru_cache(maxsize=16)(_Handle)
_jobs: list[None] = []
"""One entry for each `held_open` that hasn't ended."""
_jobs_lock = Lock()


@contextmanager
def held_open() -> Iterator[None]:
    """Hold files open from one read to the next, the last 16 that were read."""
    _jobs.append(None)
    try:
        yield
    finally:
        with _jobs_lock:
            _jobs.pop()
            if not _jobs:
                _held.cache_clear()


def outgrow_memory(files: Iterable[InputFile]) -> bool:
    """Return whether files are so large that the system's cache can't keep them.

    They would take the place of whatever else it keeps; see `given_back`.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sum(file.size for file in {*files}) > memory / 2


class _Range(NamedTuple):
    """A range of bytes of a file."""

    file: InputFile
    start: int
    stop: int


class _Thread(local):
    """The ranges that a thread has read; None if nobody asked."""

    reads: list[_Range] | None = None


_thread = _Thread()

_FOLIO = 1 << 21
"""Bytes that the system's cache may keep as one, which only goes as a whole."""


@contextmanager
def given_back() -> Iterator[None]:
    """Give the system's cache back what this thread reads meanwhile, as it won't be read again."""
    reads: list[_Range] = []
    _thread.reads = reads
    try:
        yield
    finally:
        _thread.reads = None
        for file, start, stop in _joined(reads):
            forget(file, max(start - _FOLIO, 0), stop)  # with the rest of what came before


def forget(file: InputFile, start: int, stop: int) -> None:
    """Let the system's cache drop a range of bytes."""
    with suppress(OSError):  # it was a favour
        handle = _held(file).number
        os.posix_fadvise(handle, start, stop - start, os.POSIX_FADV_DONTNEED)


def _joined(ranges: Iterable[_Range]) -> list[_Range]:
    """Return ranges with those joined that follow each other."""
    by_end: dict[tuple[InputFile, int], _Range] = {}
    for file, start, stop in ranges:
        before = by_end.pop((file, start), None)
        by_end[file, stop] = _Range(file, before.start if before else start, stop)
    return [*by_end.values()]


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Check that files are as they were when they were opened.

    Raises:
        CheckpointError: naming those that aren't.
    """
    changed = []
    for file in files:
        try:
            same = InputFile.of(file.path).state == file.state
        except OSError:
            same = False
        changed += [] if same else [file]
    if changed:
        raise changed_error(changed)


def changed_error(files: Iterable[InputFile]) -> CheckpointError:
    """Return the error for files that changed after they were opened."""
    return CheckpointError(
        f"{first_few(str(file.path) for file in files)} changed while it was read",
        hint="nothing is kept of what was computed from it; start again when its writer is done",
    )
