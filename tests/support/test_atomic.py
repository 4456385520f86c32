"""Outputs that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weightops.errors import OutputError
from weightops.support.atomic import atomic_output, check_free, resumable_output, stage_of


def test_a_failed_output_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out.json"

    def write(text: str, *, fail: bool) -> None:
        with atomic_output(out) as temporary:
            temporary.write_text(text)
            assert not out.exists()
            if fail:
                raise ZeroDivisionError("division")

    with pytest.raises(ZeroDivisionError, match="division"):
        write("begun", fail=True)
    assert list(tmp_path.iterdir()) == []
    write("complete", fail=False)
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


def test_the_old_output_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("old", "new"):
        with atomic_output(out, overwrite=True) as temporary:
            assert text == "old" or (out / "x.json").read_text() == "old"
            temporary.mkdir()
            (temporary / "x.json").write_text(text)
    assert (out / "x.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_outputs_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.png").touch()
    with pytest.raises(OutputError, match=r"out exists\nhint: overwrite=True replaces it"):
        check_free(tmp_path / "out", overwrite=False)
    with pytest.raises(OutputError, match=r"other things than .* \(holiday.png\)"):
        check_free(tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="is not a name for an output"):
        check_free(Path("/"), overwrite=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    with (
        pytest.raises(OutputError, match="is a folder, and the output is a file"),
        atomic_output(empty, overwrite=True) as temporary,
    ):
        temporary.touch()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    dead = 2**22 + 1  # no process has so large an id
    living, foreign = f".out.{os.getpid()}-0b.part", ".out.x-0c.part"
    for name in (f".out.{dead}-0a.part", living, foreign):
        (tmp_path / name).touch()
    with atomic_output(tmp_path / "out") as temporary:
        temporary.touch()
    assert {path.name for path in tmp_path.iterdir()} == {"out", living, foreign}


def test_a_failed_output_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(name: str, *, fail: bool) -> None:
        with resumable_output(out, resume=True) as folder:
            (folder / name).touch()
            second = resumable_output(out)
            with pytest.raises(OutputError, match="is being written by another process"):
                second.__enter__()
            if fail:
                raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        write("first.json", fail=True)
    assert not out.exists()
    assert stage_of(out).is_dir()
    write("second.json", fail=False)
    assert {path.name for path in out.iterdir()} == {"first.json", "second.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_file_of_a_stage(tmp_path: Path) -> None:
    with resumable_output(tmp_path / "x.safetensors", single=True) as folder:
        (folder / "x.safetensors").write_bytes(b"data")
        (folder / "journal.0").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
