"""Tasks from data sets in CLIP_benchmark's layout and in Parquet: in a folder, and on the Hub, through its cache."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.hub_cache import COMMIT, python, repository
from PIL import Image

from weightops.cli.main import run
from weightops.errors import TaskError
from weightops.tasks.hub import hub_task
from weightops.tasks.table import as_tasks, find_task
from weightops.tasks.task import captions_of

COLORS = ("red", "blue", "green")
SAMPLES = 30


def picture(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(stream, kind)
    return stream.getvalue()


def archive(members: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def samples(start: int, count: int, suffix: str = "cls") -> bytes:
    members = {}
    for i in range(start, start + count):
        members[f"s{i:07}.png"] = picture(i)
        members[f"s{i:07}.{suffix}"] = (
            f"{i % 3}".encode() if suffix == "cls" else f"picture {i}\nnumber {i}\n".encode()
        )
    return archive(members)


def wds() -> dict[str, bytes]:
    """30 training images in two archives, 6 for the test."""
    return {
        "classnames.txt": "\n".join(COLORS).encode(),
        "zeroshot_classification_templates.txt": b"a {c} thing.\nsomething {c}.\n",
        "train/nshards.txt": b"2",
        "train/0.tar": samples(0, 20),
        "train/1.tar": samples(20, 10),
        "test/nshards.txt": b"1\n",
        "test/0.tar": samples(100, 6),
    }


def lay(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_archives_in_a_folder(tmp_path: Path) -> None:
    task = find_task(str(lay(tmp_path / "wds_things", wds())))
    assert task.name == "things"
    assert task.classes == COLORS
    assert task.prompts[1] == ("a blue thing.", "something blue.")
    assert [task.sizes[split] for split in ("train", "validation", "test")] == [27, 3, 6]
    seen = set()
    for split in ("train", "validation", "test"):
        images = task.load(split)
        values = [images[i].getpixel((0, 0))[0] for i in range(len(images))]
        assert [value % 3 for value in values] == images.labels.tolist()
        seen |= set(values)
    assert seen == {*range(30), *range(100, 106)}
    assert captions_of(task.load("test")) is None


def test_archives_of_captions(tmp_path: Path) -> None:
    files = {
        "dataset_type.txt": b"retrieval",
        "test/nshards.txt": b"1",
        "test/0.tar": samples(0, 4, "txt"),
    }
    task = find_task(str(lay(tmp_path / "wds_told", files)))
    assert captions_of(task.load("test")) == [(f"picture {i}", f"number {i}") for i in range(4)]
    with pytest.raises(TaskError, match="has no images for validation, only for test"):
        task.load("validation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test/0.tar": samples(100, 6)[:2000]}, "can be read: unexpected end of data"),
        ({"test/0.tar": b"not a tar at all"}, "not an archive that can be read"),
        (
            {"test/0.tar": archive({"a.png": picture(1), "a.cls": b"7"})},
            "is b'7', not the number of one of 3 classes",
        ),
        (
            {"test/0.tar": archive({"a.png": picture(1), "a.json": b"{}"})},
            r"has no class \(.cls\) and no captions",
        ),
        ({"test/0.tar": archive({"a.cls": b"1"})}, "has no picture"),
        ({"test/nshards.txt": b"3"}, r"lacks test/1.tar \(2 of 3 archives\)"),
        ({"test/nshards.txt": b"many"}, "should hold the number of archives, not 'many'"),
        ({"test/nshards.txt": b"1\n1"}, "should hold the number of archives"),
        ({"test/nshards.txt": b"9" * 5000}, "should hold the number of archives"),
        ({"test/0.tar": samples(100, 6)[:1024]}, "0.tar is cut short"),
        (
            {"test/0.tar": archive({"a.png": picture(1), "a.txt": b" "})},
            "a.txt in .*0.tar is empty",
        ),
        (
            {"zeroshot_classification_templates.txt": b"a {classname}."},
            "each with {c} for the class; not 'a {classname}.'",
        ),
        ({"classnames.txt": b"red\n\ngreen\n"}, "has no name for class 1"),
        ({"dataset_type.txt": b"multilabel"}, "several labels an image"),
    ],
)
def test_archives_that_are_unsound(tmp_path: Path, change: dict[str, bytes], message: str) -> None:
    lay(tmp_path / "set", {**wds(), **change})
    with pytest.raises(TaskError, match=message):
        find_task(str(tmp_path / "set")).load("test")


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    lay(tmp_path / "set", {**wds(), "test/0.tar": archive({"k.png": b"no picture", "k.cls": b"0"})})
    with pytest.raises(TaskError, match=r"k.png in .*0.tar is not an image"):
        find_task(str(tmp_path / "set")).load("test")[0]


def parquet(
    folder: Path,
    start: int,
    count: int,
    labels: list[int | None] | None = None,
    damaged: bool = False,
) -> bytes:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "fine": datasets.ClassLabel(names=["a_b", "c"]),
            "coarse": datasets.ClassLabel(names=["x"]),
        }
    )
    rows = {
        "image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(start, start + count)],
        "fine": labels or [i % 2 for i in range(count)],
        "coarse": [0] * count,
    }
    if damaged:
        rows["image"] = [{"bytes": b"no picture", "path": None}, *rows["image"][1:]]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


SCRIPT = """
import json
from weightops.errors import WeightopsError
from weightops.tasks.table import as_tasks, find_task

def told(name, split=None):
    try:
        task = find_task(name)
        if split:
            task.load(split)[0]
    except WeightopsError as error:
        return str(error)

def facts(task):
    parts = {split: task.load(split) for split in ("train", "validation", "test")}
    return {
        "name": task.name, "classes": task.classes, "source": task.source,
        "sizes": {split: len(images) for split, images in parts.items()},
        "values": sorted(images[i].getpixel((0, 0))[0] for images in parts.values() for i in range(len(images))),
        "labels": parts["test"].labels.tolist(),
    }

print(json.dumps({
    "archives": facts(find_task("org/wds_things")),
    "whole": facts(find_task("org/whole@main:fine")),
    "unlabelled": told("org/odd:fine", "test"),
    "damaged": told("org/odd:fine", "train"),
    "archives_config": told("org/wds_things/one"),
    "columns": facts(find_task("org/rows/one:fine")),
    "attacked": find_task("typographic:org/wds_things").name,
    "hidden": facts(find_task("org/hidden:fine")),
    "which": told("org/rows/one"),
    "config": told("org/rows"),
    "no_config": told("org/rows/three"),
    "no_column": told("org/rows/one:size"),
    "neither": told("org/other"),
    "absent": told("org/absent"),
}))
"""


def test_from_the_hub_through_its_cache(tmp_path: Path) -> None:
    hub = tmp_path / "home" / "hub"
    repository(hub, "org/wds_things", wds(), kind="datasets")
    rows = {
        "README.md": b"#",
        "one/train-00000-of-00001.parquet": parquet(tmp_path, 0, 20),
        "one/validation-00000-of-00001.parquet": parquet(tmp_path, 50, 4),
        "two/test-00000-of-00001.parquet": parquet(tmp_path, 100, 4),
    }
    repository(hub, "org/rows", rows, kind="datasets")
    whole = {
        f"data/{split}-0.parquet": parquet(tmp_path, start, 4)
        for split, start in (("train", 0), ("validation", 50), ("test", 100))
    }
    repository(hub, "org/whole", {"README.md": b"#", **whole}, kind="datasets")
    odd = {
        "default/train/0000.parquet": parquet(tmp_path, 0, 4, damaged=True),
        "default/test/0000.parquet": parquet(tmp_path, 0, 2, [0, None]),
    }
    repository(
        hub,
        "org/odd",
        {
            "README.md": b"#",
            **odd,
            "default/validation/0000.parquet": odd["default/test/0000.parquet"],
        },
        kind="datasets",
    )
    hidden = {
        "train.parquet": parquet(tmp_path, 0, 20),
        "validation.parquet": parquet(tmp_path, 50, 4),
        "test.parquet": parquet(tmp_path, 100, 2, [None, None]),
    }
    repository(hub, "org/hidden", {"README.md": b"#", **hidden}, kind="datasets")
    repository(hub, "org/other", {"README.md": b"#", "images.zip": b""}, kind="datasets")
    told = json.loads(
        python(
            SCRIPT,
            HF_HOME=str(tmp_path / "home"),
            HF_HUB_OFFLINE="1",
            WEIGHTOPS_CACHE=str(tmp_path / "cache"),
        ).splitlines()[-1]
    )
    archives, columns = told["archives"], told["columns"]
    assert archives["name"] == "things"
    assert archives["source"] == f"org/wds_things@{COMMIT} on the Hugging Face Hub"
    assert archives["sizes"] == {"train": 27, "validation": 3, "test": 6}
    assert archives["values"] == [*range(30), *range(100, 106)]
    assert told["whole"]["sizes"] == {"train": 4, "validation": 4, "test": 4}
    assert "1 rows of test of org/odd@" in told["unlabelled"]
    assert "have no label in fine, row 1 the first" in told["unlabelled"]
    assert "image of row 0 of org/odd@" in told["damaged"]
    assert "is not an image that can be read" in told["damaged"]
    assert "a set of archives, which has no configurations" in told["archives_config"]
    assert columns["name"] == "rows-one-fine"
    assert columns["classes"] == ["a b", "c"]
    assert columns["sizes"] == {"train": 18, "validation": 2, "test": 4}
    assert columns["values"] == [*range(20), *range(50, 54)]
    assert columns["labels"] == [0, 1, 0, 1]
    assert told["hidden"]["values"] == [
        *range(20),
        *range(50, 54),
    ]  # without the test, whose labels nobody has
    assert told["attacked"] == "typographic:things"
    assert (
        "several columns of class labels: name one behind a colon, of fine, coarse" in told["which"]
    )
    assert "name one of org/rows/one, org/rows/two" in told["config"]
    assert "no configuration three; it has one, two" in told["no_config"]
    assert "no column of class labels called size" in told["no_column"]
    assert "neither archives" in told["neither"]
    assert "org/absent is no folder here" in told["absent"]


def test_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TaskError, match="is not the name of a data set"):
        hub_task("org")
    with pytest.raises(TaskError, match="there is no folder nowhere/pets"):
        find_task("./nowhere/pets")
    for parent in ("a", "b"):
        lay(tmp_path / parent / "wds_things", wds())
    with pytest.raises(TaskError, match="two different tasks are called things"):
        as_tasks([str(tmp_path / parent / "wds_things") for parent in ("a", "b")])
    lay(tmp_path / "wds_things", wds())
    assert run(["evaluate", "--tasks", str(tmp_path / "wds_things"), "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert result["dataset"] == "things"
    assert result["metrics"]["n"] == 6
    assert np.isfinite(result["metrics"]["acc1"])
