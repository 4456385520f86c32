"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

from weightops.errors import CheckpointError, OutputError

_OURS = re.compile(
    r".+\.(safetensors|json|jsonl|html|md|txt|gz|model|jinja)|(frontier|accuracy|figure|geometry)\.(png|svg)|LICENSE.*|(vocab|merges)[^.]*"
)
"""What outputs are made of, and so what may be replaced."""


@contextmanager
def whole(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
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
def staged(path: str | Path, *, single: bool = False, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """A folder beside ``path`` to write to, for as long as a large output takes; it takes the name when all has gone well.

    What a killed process has written stays there, and with ``resume`` what a failed one has, to be gone on from.

    Args:
        path: the output.
        single: the output is the one file of its name in the folder, not the folder.
        overwrite: as in `whole`.
        resume: begin with what is there.

    Raises:
        OutputError: as from `whole`, and if another process is writing this output.
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
    """The folder in which `staged` makes an output."""
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
        other = [child.name for child in sorted(path.iterdir()) if child.is_dir() or not _OURS.fullmatch(child.name)]
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


def write_json(path: Path, value: Any) -> None:
    """JSON for people and machines: indented, NaN as null, keys in their order."""
    path.write_text(json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: of repeated ones, two readers may see different values.

    Raises:
        ValueError: naming a key that isn't.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it repeats the key {key[:80]!r}")
        found[key] = value
    return found


def beside(path: Path, name: str) -> Path:
    """The file of that name beside another, or where the links of a cache put all files of its kind.

    Raises:
        CheckpointError: if it is missing, or lies elsewhere.
    """
    if Path(name).name != name or "\0" in name or len(name) > 255:
        raise CheckpointError(f"{path} points to {name[:80]!r}, outside its folder")
    file = path.parent / name
    if not file.is_file():
        raise CheckpointError(f"{path} lists {name}, which is missing: the download or copy is incomplete")
    if file.resolve().parent not in (path.parent.resolve(), path.resolve().parent):
        raise CheckpointError(f"{path} points to {name}, a link to {file.resolve()}, outside its folder")
    return file


def copy_described(config: Path, patterns: Iterable[str], folder: Path) -> None:
    """Copy the files beside a configuration that match patterns into a folder.

    Raises:
        CheckpointError: if one is a link to elsewhere.
    """
    for name in sorted({path.name for pattern in patterns for path in config.parent.glob(pattern) if path.is_file()}):
        shutil.copyfile(beside(config, name), folder / name)


def cached_folder(kind: str, files: Mapping[str, Any]) -> Path:
    """A folder of the cache, named by its content, with files of these names: bytes as they are, all else as JSON."""
    digest = sha256(kind.encode())
    for name, content in files.items():
        digest.update(f"\0{name}\0".encode())
        digest.update(content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode())
    folder = cache_dir() / kind / digest.hexdigest()[:16]
    if not folder.is_dir():
        with whole(folder, overwrite=True) as part:
            part.mkdir()
            for name, content in files.items():
                if isinstance(content, bytes):
                    (part / name).write_bytes(content)
                else:
                    write_json(part / name, content)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if it isn't one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def jsonable(value: Any) -> Any:
    """The value with NaN and infinities, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cache_dir() -> Path:
    """Where weightops keeps what it can make again: ``$WEIGHTOPS_CACHE``, or ``weightops`` in the user's cache folder."""
    chosen = os.environ.get("WEIGHTOPS_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weightops"
