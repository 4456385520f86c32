"""Folders of classes: what lies in them and beside them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.data_sets import paint

from weightops.errors import TaskError
from weightops.tasks.folder import folder_task


def fill(root: Path, *places: str, count: int = 12) -> list[str]:
    """Paint pictures into folders, and return their paths; names recur in no other folder."""
    for j, place in enumerate(places):
        for i in range(count):
            paint(root / place / f"p{j}_{i}.png", 20 * j + i)
    return [f"{place}/p{j}_{i}.png" for j, place in enumerate(places) for i in range(count)]


def test_splits_and_masks_inside_of_classes_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "splits", "cat/train", "cat/test", "dog/train", "dog/test")
    with pytest.raises(TaskError, match=r"cat/test is inside of the class cat.* seems to be a sp"):
        folder_task(tmp_path / "splits")
    fill(tmp_path / "masks", "ill/images", "ill/masks", "well/images", "well/masks")
    with pytest.raises(TaskError, match=r"ill/masks is inside of the class ill.*masks"):
        folder_task(tmp_path / "masks")


def test_folders_in_classes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "plain", "cat/images", "dog/images")
    folder_task(tmp_path / "plain")
    assert "the upper folder is the class" not in caplog.text
    fill(tmp_path / "domains", "Art/Bed", "Art/Chair", "Clipart/Bed", "Clipart/Chair")
    assert folder_task(tmp_path / "domains").classes == ("Art", "Clipart")
    assert "Art/Bed, Art/Chair, Clipart/Bed and 1 more: the upper folder is" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        ("HAM10000_images_part_1", "HAM10000_images_part_2"),
        ("images_001", "images_002"),
        ("batch1", "batch2"),
    ],
)
def test_parts_of_the_pictures_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    fill(tmp_path, *names)
    with pytest.raises(TaskError, match="seem to be no classes"):
        folder_task(tmp_path)


def test_two_folders_of_splits_with_bare_pictures(tmp_path: Path) -> None:
    fill(tmp_path, "cars_train", "cars_test")
    with pytest.raises(TaskError, match=r"only cars_test, cars_train, with pictures of no class"):
        folder_task(tmp_path)


@pytest.mark.parametrize("place", ["", "train"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_a_table_with_other_classes_is_refused(tmp_path: Path, place: str, kind: str) -> None:
    fill(tmp_path, "train/00", "train/01", "test/00", "test/01")
    files = sorted((tmp_path / place).rglob("*.png"))
    rows = [
        {"file_name": path.relative_to(tmp_path / place).as_posix(), "label": "cd"[i % 2]}
        for i, path in enumerate(files)
    ]
    table = tmp_path / place / f"metadata.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    else:
        with open(table, "w", newline="") as stream:
            delimiter = "," if kind == "csv" else "\t"
            writer = csv.DictWriter(stream, ["file_name", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    with pytest.raises(TaskError, match=rf"metadata.{kind} lists the pictures with label.*00, 01"):
        folder_task(tmp_path)


@pytest.mark.parametrize("path", ["{}", "C:\\data\\{}", "/kaggle/input/x/{}"])
def test_a_table_that_agrees_with_the_folders(tmp_path: Path, path: str) -> None:
    paths = fill(tmp_path, "train/n01", "train/n02", "test/n01", "test/n02")
    names = {"n01": "tench", "n02": "goldfish"}
    lines = ["file,split,name"]
    lines += [f"{path.format(p)},{p.split('/')[0]},{names[p.split('/')[1]]}" for p in paths]
    (tmp_path / "birds.csv").write_text("\n".join(lines))
    (tmp_path / "history.csv").write_text("epoch,loss\n0,1\n1,0\n2,0\n3,1\n")
    (tmp_path / "broken.jsonl").write_text("{'a")
    assert folder_task(tmp_path).sizes["test"] == 24


def test_links_in_classes_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "store", "far/further")
    fill(tmp_path / "task", "cat", "dog")
    (tmp_path / "task" / "dog" / "more").symlink_to(tmp_path / "store")
    (tmp_path / "task" / "dog" / "self").symlink_to(tmp_path / "task" / "dog")
    assert sum(folder_task(tmp_path / "task").sizes.values()) == 36


def test_pictures_without_a_suffix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "cat", "dog")
    (tmp_path / "dog" / "notes").write_text("BM, a Bernese mountain dog")
    folder_task(tmp_path)
    assert "left out" not in caplog.text
    for i in range(4):
        path = tmp_path / "dog" / f"p1_{i}.png"
        path.rename(path.with_suffix(".part"))
    assert sum(folder_task(tmp_path).sizes.values()) == 20
    assert "as their names don't end like a picture's: p1_3.part" in caplog.text
