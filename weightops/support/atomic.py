"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from secrets import token_hex

from weightops.errors import OutputError

_OURS = re.compile(
    r".+\.(safetensors|json|jsonl|html|md|txt|gz|model|jinja)|(frontier|accuracy|figure|geometry)\.(png|svg)|LICENSE.*|(vocab|merges)[^.]*"
)
"""What outputs are made of, and so what may be replaced."""


@contextmanager
def atomic_output(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write a file or a folder to; it takes the name when all has gone well.

    Args:
        path: the output. Its parent folders are made.
        overwrite: replace what is there; it stays until the new one is complete.

    Raises:
        OutputError: if ``path`` exists, or the disk is full or can't be written. Nothing is left behind.
    """
    target = Path(path)
    check_free(target, overwrite=overwrite)
    part = target.with_name(f".{target.name}.{os.getpid()}-{token_hex(4)}.part")
    with _guarded(target):
        try:
            _clear_dead_parts(target)
            yield part
            _sync(part)
            _replace(part, target)
        finally:
            _remove(part)


@contextmanager
def resumable_output(
    path: str | Path, *, single: bool = False, overwrite: bool = False, resume: bool = False
) -> Iterator[Path]:
    """A folder beside ``path`` to write to, for as long as a large output takes; it takes the name when all has gone well.

    What a killed process has written stays there, and with ``resume`` what a failed one has, to be gone on from.

    Args:
        path: the output.
        single: the output is the one file of its name in the folder, not the folder.
        overwrite: as in `atomic_output`.
        resume: begin with what is there.

    Raises:
        OutputError: as from `atomic_output`, and if another process is writing this output.
    """
    target = Path(path)
    check_free(target, overwrite=overwrite)
    folder = stage_of(target)
    with _guarded(target):
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            _lock(handle, target)
            if not resume:
                _remove(folder)
                folder.mkdir()
            done = False
            try:
                yield folder
                result = folder / target.name if single else folder
                _sync(result)
                _replace(result, target)
                done = True
            finally:
                if done or not resume:
                    _remove(folder)
        finally:
            os.close(handle)


def stage_of(path: Path) -> Path:
    """The folder in which `resumable_output` makes an output."""
    return path.with_name(f".{path.name}.part")


def _lock(handle: int, target: Path) -> None:
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{target} is being written by another process") from None


@contextmanager
def _guarded(target: Path) -> Iterator[None]:
    """Make the parents of an output, take them back if it doesn't come about, and say in one line why it can't be written."""
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"no space left for {target}; nothing was written") from error
        raise OutputError(f"{target} can't be written: {error.strerror or error}") from error
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse an output that can't be, before any work is done for it.

    Raises:
        OutputError: if it exists and isn't to be replaced, or is a folder with other things in it than results.
    """
    if not path.name:
        raise OutputError(f"{path} is not a name for an output")
    if not path.exists():
        return
    if not overwrite:
        raise OutputError(f"{path} exists; --overwrite (overwrite=True) replaces it")
    if path.is_dir() and any(path.iterdir()):
        other = [
            child.name
            for child in sorted(path.iterdir())
            if child.is_dir() or not _OURS.fullmatch(child.name)
        ]
        if other:
            raise OutputError(
                f"{path} is a folder that holds other things than a model or results ({other[0]}); it is left as it is"
            )


def _clear_dead_parts(target: Path) -> None:
    """Remove what earlier processes left of this output when they were killed."""
    for part in target.parent.glob(f".{escape(target.name)}.*-*.part"):
        pid = part.name.removesuffix(".part").rpartition(".")[2].partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            _remove(part)
        except (ValueError, PermissionError):
            continue


def _replace(part: Path, target: Path) -> None:
    if target.is_dir() and part.is_file():
        raise OutputError(
            f"{target} is a folder, and what was to replace it is a file; name a file in it, or remove it"
        )
    if target.is_dir() and not target.is_symlink():
        old = part.with_suffix(".old")
        target.rename(old)
        try:
            part.rename(target)
        except BaseException:
            old.rename(target)
            raise
        _remove(old)
    else:
        part.replace(target)
    _flush(target.parent)


def _sync(path: Path) -> None:
    """Flush a file, or a folder and all in it, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            if not child.is_symlink():
                _sync(child)
    _flush(path)


def _flush(path: Path) -> None:
    """Flush one file to the disk, or the list of names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't sync a folder
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
