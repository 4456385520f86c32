"""Tasks from data sets on the Hub, through its cache: archives and Parquet files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.data_sets import archive_data_set
from helpers.hub_cache import COMMIT, python, repository
from PIL import Image

from weightops.errors import TaskError
from weightops.tasks.hub import hub_task
from weightops.tasks.table import find_task


def parquet(
    folder: Path,
    start: int,
    count: int,
    labels: list[int | None] | None = None,
    damaged: bool = False,
) -> bytes:
    """Return a Parquet file of images with values from ``start``; the first may be damaged."""
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


def other_parquet(folder: Path, rows: dict[str, Any], **features: Any) -> bytes:
    """Return a Parquet file with four images, of the values 0 to 3, and other columns."""
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(4)]
    columns = {"image": images, **rows}
    kinds = datasets.Features({"image": datasets.Image(), **features})
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


def paths_only(folder: Path) -> bytes:
    """Return a Parquet file with paths of images instead of images."""
    kinds = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    cells = [{"bytes": None, "path": f"photos/{i}.png"} for i in range(4)]
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1]}, features=kinds)
    import pyarrow.parquet

    pyarrow.parquet.write_table(table.data.table, folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


SCRIPT = """
import json
from weightops.errors import WeightopsError
from weightops.tasks.table import find_task

def error_of(name, split=None):
    try:
        task = find_task(name)
        if split:
            task.load(split)[0]
    except WeightopsError as error:
        return str(error)

def facts(task):
    parts = {split: task.load(split) for split in ("train", "validation", "test")}
    values = [part[i].getpixel((0, 0))[0] for part in parts.values() for i in range(len(part))]
    return {
        "name": task.name, "classes": task.classes, "source": task.source,
        "sizes": {split: len(images) for split, images in parts.items()},
        "values": sorted(values),
        "labels": parts["test"].labels.tolist(),
    }

print(json.dumps({
    "archives": facts(find_task("org/wds_things")),
    "all_splits": facts(find_task("org/all-splits@main:fine")),
    "unlabelled": error_of("org/damaged:fine", "test"),
    "damaged": error_of("org/damaged:fine", "train"),
    "archives_config": error_of("org/wds_things/one"),
    "columns": facts(find_task("org/rows/one:fine")),
    "attacked": find_task("typographic:org/wds_things").name,
    "hidden": facts(find_task("org/hidden:fine")),
    "which_column": error_of("org/rows/one"),
    "which_config": error_of("org/rows"),
    "no_config": error_of("org/rows/three"),
    "no_column": error_of("org/rows/one:size"),
    "neither": error_of("org/other"),
    "reordered": facts(find_task("org/reordered")),
    "strings": facts(find_task("org/strings")),
    "two_images": error_of("org/two-images"),
    "one_of_two": facts(find_task("org/two-images:photo:label")),
    "new_class": error_of("org/new-class", "test"),
    "paths_only": error_of("org/paths-only", "train"),
    "absent": error_of("org/absent"),
}))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The printed facts and errors, from a process that sees a cache with these data sets."""
    work = tmp_path_factory.mktemp("hub")
    unlabelled = parquet(work, 0, 2, [0, None])
    data_sets = {
        "org/wds_things": archive_data_set(),
        "org/rows": {
            "one/train-00000-of-00001.parquet": parquet(work, 0, 20),
            "one/validation-00000-of-00001.parquet": parquet(work, 50, 4),
            "two/test-00000-of-00001.parquet": parquet(work, 100, 4),
        },
        "org/all-splits": {
            f"data/{split}-0.parquet": parquet(work, start, 4)
            for split, start in (("train", 0), ("validation", 50), ("test", 100))
        },
        "org/damaged": {
            "default/train/0000.parquet": parquet(work, 0, 4, damaged=True),
            "default/test/0000.parquet": unlabelled,
            "default/validation/0000.parquet": unlabelled,
        },
        "org/hidden": {
            "train.parquet": parquet(work, 0, 20),
            "validation.parquet": parquet(work, 50, 4),
            "test.parquet": parquet(work, 100, 2, [None, None]),
        },
        "org/other": {"images.zip": b""},
        "org/reordered": {
            "data/train-0.parquet": other_parquet(
                work, {"label": [0, 1, 0, 1]}, label=datasets.ClassLabel(names=["a", "b"])
            ),
            "data/dev-0.parquet": other_parquet(
                work, {"label": [1, 1, 0, 0]}, label=datasets.ClassLabel(names=["b", "a"])
            ),
            "data/test-0.parquet": other_parquet(
                work, {"label": [0, 0, 0, 1]}, label=datasets.ClassLabel(names=["b", "a"])
            ),
            "data/extra-0.parquet": b"",
        },
        "org/strings": {
            f"data/{split}-0.parquet": other_parquet(
                work, {"kind": ["y", "x", "y", "z"]}, kind=datasets.Value("string")
            )
            for split in ("train", "validation", "test")
        },
        "org/two-images": {
            f"data/{split}-0.parquet": other_parquet(
                work,
                {
                    "photo": [Image.new("RGB", (8, 8), (90 + i, 0, 0)) for i in range(4)],
                    "label": [0, 1, 0, 1],
                },
                photo=datasets.Image(),
                label=datasets.ClassLabel(names=["a", "b"]),
            )
            for split in ("train", "validation", "test")
        },
        "org/new-class": {
            "train.parquet": other_parquet(
                work, {"label": [0, 1, 0, 1]}, label=datasets.ClassLabel(names=["a", "b"])
            ),
            "test.parquet": other_parquet(
                work, {"label": [0, 1, 0, 1]}, label=datasets.ClassLabel(names=["a", "c"])
            ),
        },
        "org/paths-only": {
            f"{split}.parquet": paths_only(work) for split in ("train", "validation", "test")
        },
    }
    for name, files in data_sets.items():
        readme = {} if name == "org/wds_things" else {"README.md": b"#"}
        repository(work / "home" / "hub", name, {**readme, **files}, kind="datasets")
    output = python(
        SCRIPT, HF_HOME=str(work / "home"), HF_HUB_OFFLINE="1", WEIGHTOPS_CACHE=str(work / "cache")
    )
    facts: dict[str, Any] = json.loads(output.splitlines()[-1])
    return facts


def test_archives_from_the_hub(results: dict[str, Any]) -> None:
    archives = results["archives"]
    assert archives["name"] == "things"
    assert archives["source"] == f"org/wds_things@{COMMIT} on the Hugging Face Hub"
    assert archives["sizes"] == {"train": 27, "validation": 3, "test": 6}
    assert archives["values"] == [*range(30), *range(100, 106)]
    assert results["attacked"] == "typographic:things"


def test_parquet_files_from_the_hub(results: dict[str, Any]) -> None:
    assert results["all_splits"]["sizes"] == {"train": 4, "validation": 4, "test": 4}
    columns = results["columns"]
    assert columns["name"] == "rows-one-fine"
    assert columns["classes"] == ["a b", "c"]
    assert columns["sizes"] == {"train": 18, "validation": 2, "test": 4}
    assert columns["values"] == [*range(20), *range(50, 54)]
    assert columns["labels"] == [0, 1, 0, 1]


def test_a_test_split_with_hidden_labels_is_not_used(results: dict[str, Any]) -> None:
    assert results["hidden"]["values"] == [*range(20), *range(50, 54)]


def test_errors_name_the_data_set_and_the_remedy(results: dict[str, Any]) -> None:
    assert "1 rows of test of org/damaged@" in results["unlabelled"]
    assert "have no label in fine, row 1 the first" in results["unlabelled"]
    assert "image of row 0 of org/damaged@" in results["damaged"]
    assert "is not an image that can be read" in results["damaged"]
    assert "a set of archives, which has no configurations" in results["archives_config"]
    assert (
        "several columns of class labels\nhint: name a column behind a colon, one of fine, coarse"
        in results["which_column"]
    )
    assert "hint: name one of org/rows/one, org/rows/two" in results["which_config"]
    assert "no configuration three; it has one, two" in results["no_config"]
    assert "no column of class labels called size" in results["no_column"]
    assert "neither archives" in results["neither"]
    assert "org/absent is no folder here" in results["absent"]
    with pytest.raises(TaskError, match="is not the name of a data set"):
        hub_task("org")


def test_labels_of_every_file_are_matched_by_name(results: dict[str, Any]) -> None:
    reordered = results["reordered"]
    assert reordered["classes"] == ["a", "b"]
    assert reordered["sizes"] == {"train": 4, "validation": 4, "test": 4}
    assert reordered["labels"] == [1, 1, 1, 0]
    assert "classes that the first file of the data set doesn't have: c" in results["new_class"]


def test_strings_are_classes_in_sorted_order(results: dict[str, Any]) -> None:
    assert results["strings"]["classes"] == ["x", "y", "z"]
    assert results["strings"]["labels"] == [1, 0, 1, 2]


def test_columns_of_images(results: dict[str, Any]) -> None:
    assert (
        "several columns of images\nhint: name a column behind a colon, one of image, photo"
        in (results["two_images"])
    )
    assert results["one_of_two"]["values"] == sorted([90, 91, 92, 93] * 3)
    assert "has paths of images in image (photos/0.png), and no images" in results["paths_only"]


def test_a_folder_of_parquet_files_here(tmp_path: Path) -> None:
    (tmp_path / "sets" / "data").mkdir(parents=True)
    for split, start in (("train", 0), ("validation", 20), ("test", 40)):
        content = parquet(tmp_path, start, 6)
        (tmp_path / "sets" / "data" / f"{split}-00000-of-00001.parquet").write_bytes(content)
    task = find_task(f"{tmp_path}/sets:fine")
    assert (task.name, task.classes) == ("sets", ("a b", "c"))
    for split, start in (("train", 0), ("validation", 20), ("test", 40)):
        images = task.load(split)
        values = [images[i].getpixel((0, 0))[0] for i in range(6)]
        assert values == list(range(start, start + 6))
        assert images.labels.tolist() == [0, 1] * 3
    assert find_task(f"{tmp_path}/sets/data:image:fine").classes == task.classes
    with pytest.raises(TaskError, match="several columns of class labels"):
        find_task(str(tmp_path / "sets"))
    with pytest.raises(TaskError, match="no column of class labels called finer"):
        find_task(f"{tmp_path}/sets:finer")


def test_a_folder_that_save_to_disk_wrote(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a_b", "c"])}
    )

    def rows(start: int) -> datasets.Dataset:
        images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(start, start + 6)]
        return datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)

    starts = {"train": 0, "validation": 20, "test": 40}
    written = datasets.DatasetDict({split: rows(start) for split, start in starts.items()})
    written["test"] = written["test"].filter(lambda row: row["label"] == 1)
    written.save_to_disk(tmp_path / "saved", num_shards={"train": 2, "validation": 1, "test": 1})
    task = find_task(f"{tmp_path}/saved")
    assert (task.name, task.classes) == ("saved", ("a b", "c"))
    for split, expected in {"train": [*range(6)], "test": [41, 43, 45]}.items():
        images = task.load(split)
        assert [images[i].getpixel((0, 0))[0] for i in range(len(images))] == expected
        assert images.labels.tolist() == [value % 2 for value in expected]
    with pytest.raises(TaskError, match="is one split that save_to_disk of datasets wrote"):
        find_task(f"{tmp_path}/saved/train")
    file = tmp_path / "saved" / "train" / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:100])
    damaged = find_task(f"{tmp_path}/./saved")
    with pytest.raises(TaskError, match=r"a table that can't be read, data-00001-of-00002\.arrow"):
        damaged.load("train")


def test_tables_of_no_known_split_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train-0", "test-0", "fold3-0"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(tmp_path, 0, 6))
    (tmp_path / "rows.parquet").unlink()
    assert len(find_task(f"{tmp_path}:fine").load("test")) == 6
    assert "not used, as no split is called so: fold3" in caplog.text


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(tmp_path, 0, 6))
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(TaskError, match=r"a table that can't be read, train-1\.parquet"):
        find_task(f"{tmp_path}:fine").load("train")


def test_copies_between_splits_of_parquet_files_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split, start in (("train", 0), ("validation", 20), ("test", 4)):
        content = parquet(tmp_path, start, 6, damaged=True)
        (tmp_path / f"{split}-0.parquet").write_bytes(content)
    task = find_task(f"{tmp_path}:fine")
    task.load("train")
    task.load("validation")
    assert "has 1 pictures in two splits" in caplog.text  # the damaged one
    task.load("test")
    told = [text for text in caplog.messages if "test 1 = train 5" in text]
    assert len(told) == 1
    assert "has 2 pictures in two splits, so its accuracies are too high" in told[0]


def test_names_of_folders_are_no_patterns(tmp_path: Path) -> None:
    for name, start in (("a*", 0), ("ab", 100), ("[a]", 200)):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}-0.parquet").write_bytes(parquet(tmp_path, start, 6))
    for name, start in (("a*", 0), ("[a]", 200)):
        images = find_task(f"{tmp_path}/{name}:fine").load("test")
        assert [images[i].getpixel((0, 0))[0] for i in range(6)] == list(range(start, start + 6))


def test_metadata_beside_pictures_is_no_data_set(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / "all" / split / name).mkdir(parents=True)
            picture = Image.new("RGB", (8, 8), (len(split), i, 0))
            picture.save(tmp_path / "all" / split / name / "1.png")
        (tmp_path / "all" / split / "metadata.parquet").write_bytes(parquet(tmp_path, 0, 2))
    assert find_task(f"{tmp_path}/all").classes == ("cat", "dog")
