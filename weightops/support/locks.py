"""Locks on outputs: one process at a time prepares an output, and others hear which one it is."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import get_ident

from weightops.errors import OutputError

_held: dict[Path, int] = {}
"""Lock file -> the thread of this process that holds it."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


def lock_of(target: Path) -> Path:
    """Return the file that a process locks while it prepares an output."""
    return target.with_name(f".{target.name}.lock")


@contextmanager
def exclusive(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes and threads from preparing an output.

    The lock is on a file of its own beside the output, and ends with the process. A thread that
    holds the lock may take it again.

    Args:
        target: the output; its parent folder exists.
        wait: wait for another process that prepares the output.

    Raises:
        OutputError: if another process prepares the output, saying which and since when.
    """
    file = lock_of(target.absolute())
    if _held.get(file) == get_ident():
        yield
        return
    handle = _lock(file, target, wait=wait)
    _held[file] = get_ident()
    try:
        yield
    finally:
        del _held[file]
        with suppress(OSError):  # removed before the lock ends, so that nobody locks a dead file
            file.unlink()
        os.close(handle)


def _lock(file: Path, target: Path, *, wait: bool) -> int:
    """Return a handle of the locked file, which says who holds it."""
    while True:
        handle = os.open(file, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _flock(handle, file, target, wait=wait)
            if _is_at(handle, file):  # its holder may have removed it meanwhile
                since = datetime.now().astimezone().isoformat(" ", "seconds")
                holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
                os.ftruncate(handle, 0)
                with suppress(OSError):  # a full disk: the lock holds, and its holder has no name
                    os.pwrite(handle, json.dumps(holder).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _flock(handle: int, file: Path, target: Path, *, wait: bool) -> None:
    with suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise OutputError(
                f"{target} is being written by {_holder(file)}",
                hint="wait until it ends, or choose another name",
            ) from None


def _is_at(handle: int, file: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(file))
    return False


def _holder(file: Path) -> str:
    """Return who holds a lock, in words."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        process, host, since = int(holder["process"]), str(holder["host"]), str(holder["since"])
        datetime.fromisoformat(since)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return "another process"
    return f"process {process} on {host[:64]!r} since {since}".replace("'", "")
