"""Checks of whole tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.data_sets import paint

from weightops.cli.main import run
from weightops.tasks.check import check_task
from weightops.tasks.folder import folder_task


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder with one picture that is none, and one that is in two splits."""
    for j, split in enumerate(("train", "val", "test")):
        for i in range(6):
            paint(tmp_path / "set" / split / "ab"[i % 2] / f"{i}.png", 50 * j + i)
    (tmp_path / "set" / "test" / "b" / "5.png").write_bytes(b"no picture")
    paint(tmp_path / "set" / "test" / "a" / "copy.png", 2)
    return tmp_path / "set"


def test_every_picture_is_looked_at(damaged: Path) -> None:
    found = check_task(folder_task(damaged))
    assert found.counts == {"train": [3, 3], "validation": [3, 3], "test": [4, 3]}
    assert not found.sound
    assert list(found.faults["test"]) == [6]
    assert "5.png is not an image" in found.faults["test"][6]
    assert found.copies == [(("test", 3), ("train", 1))]


def test_on_the_command_line(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks", "check", str(damaged)]) == 1
    printed = capsys.readouterr()
    assert "1 pictures are in two splits" in printed.out
    assert "test 6: " in printed.out
    assert "1 pictures of set can't be read" in printed.err
    assert run(["tasks", "check", str(damaged), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["counts"]["test"] == [4, 3]
    assert run(["tasks", "check", "digits"]) == 0
    assert run(["tasks", "examine", "digits"]) == 2


def test_a_run_is_refused_before_it_trains(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["patch", "--task", str(damaged), "--supported", "digits", "--steps", "1"]
    assert run([*command, "-o", out]) == 1
    assert "1 of 7 pictures of set test can't be read" in capsys.readouterr().err


def test_faults_are_left_out_and_counted(
    damaged: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["evaluate", "embedded", "--tasks", str(damaged), "--json"]
    assert run(command) == 1
    capsys.readouterr()
    assert run([*command, "--skip-unreadable"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["metrics"]["n"], record["unreadable"]) == (6, 1)
    assert record["orientation"] == "upright"
    assert "1 pictures of set test are left out, which can't be read" in caplog.text
