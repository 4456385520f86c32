"""Tasks from data sets in CLIP_benchmark's layout."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.data_sets import (
    CLASSES,
    archive,
    archive_data_set,
    encoded_image,
    labelled_archive,
    write_files,
)

from weightops.cli.main import run
from weightops.errors import TaskError
from weightops.tasks.archives import archive_task
from weightops.tasks.table import find_task
from weightops.tasks.task import SPLITS, captions_of


def test_archives_in_a_folder(tmp_path: Path) -> None:
    task = find_task(str(write_files(tmp_path / "wds_things", archive_data_set())))
    assert task.name == "things"
    assert task.classes == CLASSES
    assert task.prompts[1] == ("a blue thing.", "something blue.")
    assert [task.sizes[split] for split in SPLITS] == [27, 3, 6]
    seen = set()
    for split in SPLITS:
        images = task.load(split)
        values = [images[i].getpixel((0, 0))[0] for i in range(len(images))]
        assert [value % 3 for value in values] == images.labels.tolist()
        seen |= set(values)
    assert seen == {*range(30), *range(100, 106)}
    assert captions_of(task.load("test")) is None


def test_archives_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path / "wds_things", archive_data_set())
    assert run(["evaluate", "--tasks", str(tmp_path / "wds_things"), "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert result["dataset"] == "things"
    assert result["metrics"]["n"] == 6
    assert np.isfinite(result["metrics"]["acc1"])


def test_splits_of_archives_by_other_names(tmp_path: Path) -> None:
    more = {"dev/nshards.txt": b"1", "dev/0.tar": labelled_archive(200, 5)}
    folder = write_files(tmp_path / "wds_things", {**archive_data_set(), **more})
    task = find_task(str(folder))
    assert [task.sizes[split] for split in SPLITS] == [30, 5, 6]
    assert task.load("validation")[0].getpixel((0, 0))[0] == 200
    for name, message in (
        ("valid", "two splits for validation: dev and valid"),
        ("extra", "no spl"),
    ):
        write_files(folder, {f"{name}/nshards.txt": b"1"})
        with pytest.raises(TaskError, match=message):
            archive_task("things", lambda _: folder, "the folder")
        (folder / name / "nshards.txt").unlink()


def test_archives_beyond_the_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {"test/1.tar": labelled_archive(200, 3), "classnames.txt": b"red\nred\ngreen"}
    folder = write_files(tmp_path / "wds_things", {**archive_data_set(), **more})
    task = find_task(str(folder))
    with pytest.raises(TaskError, match=r"test has 1\.tar, and nshards.txt says that there are 1"):
        task.load("test")
    assert "gives one name to several classes: red" in caplog.text


def test_pictures_in_two_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copied = {"test/0.tar": labelled_archive(28, 6)}
    folder = write_files(tmp_path / "wds_things", {**archive_data_set(), **copied})
    task = find_task(str(folder))
    task.load("test")
    assert "in two splits" not in caplog.text
    for split in ("train", "validation", "train"):
        task.load(split)
    assert caplog.text.count("has 2 pictures in two splits") == 1


def test_archives_of_captions(tmp_path: Path) -> None:
    members = {}
    for i in range(4):
        members[f"s{i}.png"] = encoded_image(i)
        members[f"s{i}.txt"] = f"picture {i}\nnumber {i}\n".encode()
    files = {
        "dataset_type.txt": b"retrieval",
        "test/nshards.txt": b"1",
        "test/0.tar": archive(members),
    }
    task = find_task(str(write_files(tmp_path / "wds_captioned", files)))
    assert captions_of(task.load("test")) == [(f"picture {i}", f"number {i}") for i in range(4)]
    with pytest.raises(TaskError, match="has no images for validation, only for test"):
        task.load("validation")


_NAME = tarfile.TarInfo("././@LongLink")
_NAME.type, _NAME.size = tarfile.GNUTYPE_LONGNAME, 2**33 - 1
LONG_NAME = _NAME.tobuf(tarfile.USTAR_FORMAT)
"""The header of a name that is longer than its archive."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test/0.tar": labelled_archive(100, 6)[:2000]}, "can be read: unexpected end of data"),
        ({"test/0.tar": b"not a tar at all"}, "not an archive that can be read"),
        (
            {"test/0.tar": archive({"a.png": encoded_image(1), "a.cls": b"7"})},
            "is b'7', not the number of one of 3 classes",
        ),
        (
            {"test/0.tar": archive({"a.png": encoded_image(1), "a.cls": b"9" * 5000})},
            "not the number of one of 3 classes",
        ),
        (
            {"test/0.tar": archive({"a.png": encoded_image(1), "a.json": b"{}"})},
            r"has no class \(.cls\) and no captions",
        ),
        ({"test/0.tar": archive({"a.cls": b"1"})}, "has no picture"),
        ({"test/nshards.txt": b"3"}, r"lacks test/1.tar \(2 of 3 archives\)"),
        ({"test/nshards.txt": b"many"}, "should hold the number of archives, not 'many'"),
        ({"test/nshards.txt": b"1\n1"}, "should hold the number of archives"),
        ({"test/nshards.txt": b"9" * 5000}, "should hold the number of archives"),
        ({"test/0.tar": labelled_archive(100, 6)[:1024]}, "0.tar is cut short"),
        ({"test/0.tar": LONG_NAME + labelled_archive(100, 6)}, "a header that claims 8,589,934,5"),
        (
            {"test/0.tar": archive({"a.png": encoded_image(1), "a.txt": b" "})},
            "a.txt in .*0.tar is empty",
        ),
        (
            {"zeroshot_classification_templates.txt": b"a {classname}."},
            "each with {c} for the class; not 'a {classname}.'",
        ),
        ({"classnames.txt": b"red\n\ngreen\n"}, "has no name for class 1"),
        ({"dataset_type.txt": b"multilabel"}, "several labels an image"),
        ({"test/0.tar": archive({"k.png": b"none", "k.cls": b"0"})}, "k.png in .* not an image"),
    ],
)
def test_damaged_archives(tmp_path: Path, change: dict[str, bytes], message: str) -> None:
    write_files(tmp_path / "set", {**archive_data_set(), **change})
    with pytest.raises(TaskError, match=message):
        find_task(str(tmp_path / "set")).load("test")[0]
