"""Files that are held open while a job lasts."""

import ctypes
import os
import sys
from mmap import ACCESS_COPY, mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightops.errors import CheckpointError
from weightops.merging.merge import merge
from weightops.support.input_files import InputFile, given_back, held_open


def _open_paths() -> set[str]:
    folder = "/proc/self/fd"
    return {os.path.realpath(f"{folder}/{number}") for number in os.listdir(folder)}


def _read(file: InputFile) -> bytes:
    buffer = bytearray(file.size)
    file.read_into(memoryview(buffer), 0)
    return bytes(buffer)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_files_are_held_open_for_as_long_as_a_job_lasts_and_few_at_once(tmp_path: Path) -> None:
    files = []
    for i in range(40):
        (tmp_path / str(i)).write_bytes(bytes([i] * 9))
        files.append(InputFile.of(tmp_path / str(i)))
    names = {str(file.path.resolve()) for file in files}
    with held_open():
        with held_open():
            assert [_read(file) for file in files] == [bytes([i] * 9) for i in range(40)]
        held = _open_paths() & names
        assert 0 < len(held) <= 16
        assert str(files[-1].path.resolve()) in held
    assert not _open_paths() & names
    assert _read(files[0]) == bytes(9)
    assert not _open_paths() & names


@pytest.mark.parametrize("size", [3, 20])
def test_a_file_that_is_held_open_and_changes_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(9))
    file = InputFile.of(path)
    with held_open():
        _read(file)
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            _read(file)


def _in_cache(path: Path) -> float:
    """Return the share of a file's pages that the system's cache holds."""
    size, page = path.stat().st_size, os.sysconf("SC_PAGE_SIZE")
    found = (ctypes.c_ubyte * -(-size // page))()
    with open(path, "rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(size), found)
        del first
    assert not failed
    return sum(flag & 1 for flag in found) / len(found)


def _skip_unless_caches_drop(path: Path) -> None:
    """Skip the test where the system doesn't drop a file from its cache when it is told to."""
    if not sys.platform.startswith("linux"):
        pytest.skip("looks into Linux's cache")
    path.write_bytes(bytes(1 << 20))
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    if _in_cache(path):
        pytest.skip("this file system keeps what it is told to drop")


def test_what_was_read_is_given_back(tmp_path: Path) -> None:
    _skip_unless_caches_drop(tmp_path / "probe")
    path, size = tmp_path / "file", 1 << 22
    with open(path, "wb") as stream:
        stream.write(bytes(6 * size))
        stream.flush()
        os.fsync(stream.fileno())
    file, buffer = InputFile.of(path), memoryview(bytearray(size))
    with held_open():
        for part in range(2):
            with given_back():
                file.read_into(buffer, 100 + 2 * part * size)
                file.read_into(buffer, 100 + (2 * part + 1) * size)
    assert _in_cache(path) < 0.5  # a third wasn't read


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_what_outgrows_the_memory_takes_no_room_in_the_cache(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of files that fit."""
    _skip_unless_caches_drop(tmp_path / "probe")
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in paths:
        tensors = {n: torch.randn(1500, 1000, generator=generator).bfloat16() for n in "abcd"}
        save_file({**tensors, "small": torch.randn(7, generator=generator)}, path)
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
    base = None if method != "ties" else paths[0]
    merged = merge(paths[1:], method, base=base)
    merged.save(tmp_path / "fits.safetensors")
    assert min(map(_in_cache, paths[1:])) > 0.5
    memory = sum(path.stat().st_size for path in paths[1:])
    fits, outgrows = tmp_path / "fits.safetensors", tmp_path / "outgrows.safetensors"
    left = 1.0
    for _ in range(3):  # on a busy system, pages may be held for a moment as they are given back
        with monkeypatch.context() as small:
            small.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}.get)
            merge(paths[1:], method, base=base).save(outgrows, overwrite=True)
        left = min(left, max(map(_in_cache, [*paths[1:], outgrows])))
        assert outgrows.read_bytes() == fits.read_bytes()
        if left < 0.2:
            break
    assert left < 0.2
