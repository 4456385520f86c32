"""Outputs that appear whole or not at all: they are written beside their place, then renamed."""

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

_RESULT_FILE = re.compile(
    r".+\.(safetensors|json|jsonl|html|md|txt|gz|model|jinja)"
    r"|(frontier|accuracy|figure|geometry)\.(png|svg)|LICENSE.*|(vocab|merges)[^.]*"
)
"""Names of files in outputs. A folder that holds any other file is never replaced."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_output(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and rename it to ``path`` when all went well.

    Args:
        path: the output. Its parent folders are created.
        overwrite: replace an existing output; it stays until the new one is complete.

    Raises:
        OutputError: if ``path`` exists, or can't be written. Nothing is left behind.
    """
    target = Path(path)
    check_free(target, overwrite=overwrite)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{token_hex(4)}.part")
    with _output_errors(target):
        try:
            _remove_abandoned(target)
            yield temporary
            _sync(temporary)
            _replace(temporary, target)
        finally:
            _remove(temporary)


@contextmanager
def resumable_output(
    path: str | Path, *, single: bool = False, overwrite: bool = False, resume: bool = False
) -> Iterator[Path]:
    """Yield a folder beside ``path`` for a large output, and rename it when all went well.

    The files of a process that was killed stay in the folder, and with ``resume`` also those of a
    process that failed, so that a later process can resume.

    Args:
        path: the output.
        single: the output is the file in the folder that has its name, not the folder.
        overwrite: replace an existing output; it stays until the new one is complete.
        resume: begin with the files that are in the folder.

    Raises:
        OutputError: if ``path`` exists, can't be written, or is being written by another process.
    """
    target = Path(path)
    check_free(target, overwrite=overwrite)
    folder = stage_of(target)
    with _output_errors(target):
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            _lock(handle, target)
            if not resume:
                _remove(folder)
                folder.mkdir()
            complete = False
            try:
                yield folder
                result = folder / target.name if single else folder
                _sync(result)
                _replace(result, target)
                complete = True
            finally:
                if complete or not resume:
                    _remove(folder)
        finally:
            os.close(handle)


def stage_of(path: Path) -> Path:
    """Return the folder in which `resumable_output` prepares an output."""
    return path.with_name(f".{path.name}.part")


def _lock(handle: int, target: Path) -> None:
    with suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{target} is being written by another process") from None


@contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    """Create the parents of an output, remove them if it fails, and convert OSError."""
    created = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutputError(f"no space left for {target}; nothing was written") from error
        raise OutputError(f"{target} can't be written: {error.strerror or error}") from error
    finally:
        for parent in created:
            with suppress(OSError):  # a complete output is in it
                parent.rmdir()


def check_free(path: Path, *, overwrite: bool) -> None:
    """Check that an output can be written, before any work is done for it.

    Raises:
        OutputError: if the output exists without ``overwrite``, or is a folder with other files
            than results.
    """
    if not path.name:
        raise OutputError(f"{path} is not a name for an output")
    if not path.exists():
        return
    if not overwrite:
        raise OutputError(f"{path} exists", hint="overwrite=True replaces it")
    if path.is_dir():
        for child in sorted(path.iterdir()):
            if child.is_dir() or not _RESULT_FILE.fullmatch(child.name):
                raise OutputError(
                    f"{path} is a folder that holds other things than a model or results "
                    f"({child.name})",
                    hint="it is not replaced; choose another name, or remove it",
                )


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary paths of this output whose processes were killed."""
    for path in target.parent.glob(f".{escape(target.name)}.*-*.part"):
        pid = path.name.removesuffix(".part").rpartition(".")[2].partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            _remove(path)
        except (ValueError, PermissionError):
            continue


def _replace(temporary: Path, target: Path) -> None:
    """Rename a complete output to its place, where an older output may be."""
    if target.is_dir() and temporary.is_file():
        raise OutputError(
            f"{target} is a folder, and the output is a file",
            hint="name a file in the folder, or remove it",
        )
    if target.is_dir() and not target.is_symlink():
        old = temporary.with_suffix(".old")
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        _remove(old)
    else:
        temporary.replace(target)
    _flush(target.parent)


def _sync(path: Path) -> None:
    """Flush a file, or a folder with all its files, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            if not child.is_symlink():
                _sync(child)
    _flush(path)


def _flush(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't flush a folder
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
