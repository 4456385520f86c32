"""Outputs that appear whole or not at all: they are written beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from weightops.errors import OutputError
from weightops.support.locks import exclusive
from weightops.support.result_files import EVAL_RESULTS, RESULTS

_RESULT_FILE = re.compile(
    r".+\.(safetensors|json|jsonl|html|md|txt|gz|model|jinja)|LICENSE.*|(vocab|merges)[^.]*"
    rf"|{RESULTS}"
)
"""Names of files in outputs. A folder that holds any other file is never replaced."""

Overwrite = bool | Literal["all"]
"""Whether an output may be replaced; with "all", also an input, or a folder with other files."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def held(path: str | Path, *, wait: bool = False) -> Iterator[Path]:
    """Hold an output for this thread: other processes that want to write it are refused.

    Yields the output's path behind links, after what a killed process left has been cleared.

    Args:
        path: the output. Its parent folders are created, and removed if they stay empty.
        wait: wait for another process that writes the output.

    Raises:
        OutputError: if the output is being written by another process, or can't be written.
    """
    target = behind_links(Path(path))
    with ExitStack() as stack:
        with _output_errors(target):
            stack.enter_context(_parents(target))
            stack.enter_context(exclusive(target, wait=wait))
            _restore_killed(target)
        yield target


@contextmanager
def reserved(
    path: str | Path, *, overwrite: Overwrite = False, wait: bool = False
) -> Iterator[Path]:
    """Hold an output, see `held`, that is free to be written, see `check_free`."""
    check_free(Path(path), overwrite=overwrite)
    with held(path, wait=wait) as target:
        check_free(target, overwrite=overwrite)  # another process may just have ended
        yield target


@contextmanager
def atomic_output(
    path: str | Path, *, overwrite: Overwrite = False, wait: bool = False
) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and rename it to ``path`` when all went well.

    Args:
        path: the output. Its parent folders are created.
        overwrite: replace an existing output; it stays until the new one is complete.
        wait: wait for another process that writes the output.

    Raises:
        OutputError: if ``path`` exists, can't be written, or is being written by another process.
            Nothing is left behind.
    """
    with reserved(path, overwrite=overwrite, wait=wait) as target, _output_errors(target):
        temporary = stage_of(target)
        try:
            _remove(temporary)
            yield temporary
            _sync(temporary)
            _replace(temporary, target)
        finally:
            _remove(temporary)


@contextmanager
def resumable_output(
    path: str | Path, *, single: bool = False, overwrite: Overwrite = False, resume: bool = False
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
    with reserved(path, overwrite=overwrite) as target, _output_errors(target):
        folder = stage_of(target)
        if not resume or not folder.is_dir():
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


def stage_of(path: Path) -> Path:
    """Return the file or folder in which an output is prepared."""
    return _beside(behind_links(path), "part")


def behind_links(path: Path) -> Path:
    """Return the path that an output replaces: behind a link, what the link points to.

    Raises:
        OutputError: if links point to each other in a circle.
    """
    try:
        found = path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError):  # of a circle, before Python 3.13
        found = path
    if found.is_symlink():
        raise OutputError(f"{path} is a link that leads nowhere")
    return found


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Create the parent folders of an output, and remove them if they stay empty."""
    created = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in created:
            with suppress(OSError):  # a complete output is in it
                parent.rmdir()


@contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    """Convert the errors of the system."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutputError(f"no space left for {target}; nothing was written") from error
        raise OutputError(f"{target} can't be written: {error.strerror or error}") from error


def check_free(path: Path, *, overwrite: Overwrite, inputs: Iterable[Path] = ()) -> None:
    """Check that an output can be written, before any work is done for it.

    Args:
        path: the output.
        overwrite: an existing output may be replaced.
        inputs: the files that are read.

    Raises:
        OutputError: if the output exists without ``overwrite``; or, unless that is "all", if it is
            an input or a folder with an input or with other files than results.
    """
    if not path.name:
        raise OutputError(f"{path} is not a name for an output")
    link = behind_links(path)
    target = link.parent.resolve() / link.name
    if Path.cwd().is_relative_to(target):
        raise OutputError(f"{path} is the folder that you are in", hint="choose another name")
    if not path.exists():
        return
    if overwrite == "all":
        return
    for file in inputs:
        if target in (file, file.resolve(), *file.parents, *file.resolve().parents):
            raise OutputError(
                f"{path} is an input, or holds the input {file.name}",
                hint="choose another name; overwrite='all' replaces it all the same",
            )
    if not overwrite:
        raise OutputError(f"{path} exists", hint="overwrite=True replaces it")
    if path.is_dir():
        for child in sorted(path.iterdir()):
            is_result = bool(_RESULT_FILE.fullmatch(child.name)) and not child.is_dir()
            if not is_result and child.name != EVAL_RESULTS:
                raise OutputError(
                    f"{path} is a folder that holds other things than a model or results "
                    f"({child.name})",
                    hint="choose another name; overwrite='all' replaces all of it",
                )


def _restore_killed(target: Path) -> None:
    """Bring back an output that a killed process had moved aside, and clear what it left.

    The caller holds the lock, so no living process needs any of it.
    """
    aside = _beside(target, "aside")
    if not target.exists() and aside.exists():
        aside.rename(target)
    _remove(aside)
    _remove(_beside(target, "old"))
    former = re.compile(rf"\.{re.escape(target.name)}\.\d+-[0-9a-f]{{8}}\.part")
    for path in target.parent.iterdir():  # parts were named by their process until version 0.2
        if former.fullmatch(path.name):
            _remove(path)


def clear_killed(folder: Path) -> None:
    """Remove what processes that were killed left in a folder whose lock the caller holds."""
    for path in folder.glob(".*"):
        if path.suffix in (".part", ".old", ".lock"):
            _remove(path)


def _beside(target: Path, purpose: str) -> Path:
    return target.with_name(f".{target.name}.{purpose}")


def _replace(temporary: Path, target: Path) -> None:
    """Rename a complete output to its place, where an older output may be."""
    if target.is_dir() and temporary.is_file():
        raise OutputError(
            f"{target} is a folder, and the output is a file",
            hint="name a file in the folder, or remove it",
        )
    if target.is_dir():
        _replace_folder(temporary, target)
    else:
        temporary.replace(target)
    _flush(target.parent)


def _replace_folder(temporary: Path, target: Path) -> None:
    """Exchange a folder for an older one, in one step where the system can."""
    old, aside = _beside(target, "old"), _beside(target, "aside")
    temporary.rename(old)  # under this name, the older one is never taken for a part to resume
    if not _exchange(old, target):
        old.rename(temporary)
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(old)
    _flush(target.parent)
    _remove(old)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one step; return False where the system or file system can't."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    here, exchange = -100, 2
    if rename(here, os.fsencode(a.absolute()), here, os.fsencode(b.absolute()), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code))


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
        with suppress(OSError):  # where few files can be open: this opens one folder at a time
            for folder, _, files in os.walk(path, topdown=False):
                for name in files:
                    Path(folder, name).unlink()
                Path(folder).rmdir()
    else:
        path.unlink(missing_ok=True)
