"""Files that are held open while a job lasts."""

import os
from pathlib import Path

import pytest

from weightops.errors import CheckpointError
from weightops.support.input_files import InputFile, held_open


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
