"""Tasks from folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.data_sets import paint
from PIL import Image

from weightops import Task, evaluate
from weightops.cli.main import run
from weightops.errors import TaskError
from weightops.tasks.folder import folder_task
from weightops.tasks.pictures import read_image
from weightops.tasks.table import find_task
from weightops.tasks.task import PROMPTS, SPLITS


def contents(task: Task, split: str) -> set[tuple[int, int]]:
    """Return the value (see `paint`) and label of each image."""
    images = task.load(split)
    return {(images[i].getpixel((0, 0))[0], int(images.labels[i])) for i in range(len(images))}


def test_without_splits(tmp_path: Path) -> None:
    for i in range(60):
        paint(tmp_path / ("red_car" if i % 3 else "bike") / f"{i:02}.png", i)
    (tmp_path / "notes.md").write_text("not an image")
    task = folder_task(tmp_path)
    assert task.classes == ("bike", "red car")
    assert task.templates == PROMPTS
    assert task.name == tmp_path.name
    assert dict(task.sizes) == {"train": 42, "validation": 6, "test": 12}
    parts = [contents(task, split) for split in SPLITS]
    assert [len(part) for part in parts] == [42, 6, 12]
    assert len(set.union(*parts)) == 60
    assert all((label == 0) == (value % 3 == 0) for part in parts for value, label in part)
    assert contents(folder_task(tmp_path), "test") == parts[2]


def test_with_splits_and_prompts(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("val", 4), ("test", 6)):
        for i in range(count):
            paint(tmp_path / split / "ab"[i % 2] / f"{i}.png", i)
    (tmp_path / "prompts.txt").write_text("the letter {}.\n\na {}\n")
    task = find_task(str(tmp_path))
    assert dict(task.sizes) == {"train": 20, "validation": 4, "test": 6}
    assert task.prompts[0] == ("the letter a.", "a a")
    (tmp_path / "val").rename(tmp_path / "test" / "a" / "more")
    assert dict(folder_task(tmp_path).sizes) == {"train": 18, "validation": 2, "test": 10}


def test_layouts_of_other_data_sets(tmp_path: Path) -> None:
    for i in range(40):
        paint(tmp_path / "deep" / "ab"[i % 2] / str(i % 3) / f"{i}.png", i)
        paint(tmp_path / "imagenet" / ("val" if i < 10 else "train") / "ab"[i % 2] / f"{i}.png", i)
        paint(tmp_path / "cifar" / ("train" if i % 2 else "truck") / f"{i}.png", i)
    assert sum(folder_task(tmp_path / "deep").sizes.values()) == 40
    imagenet = folder_task(tmp_path / "imagenet")
    assert dict(imagenet.sizes) == {"train": 27, "validation": 3, "test": 10}
    assert folder_task(tmp_path / "cifar").classes == ("train", "truck")
    paint(tmp_path / "imagenet" / "valid" / "a" / "1.png", 1)
    with pytest.raises(TaskError, match="has two folders for validation: val and valid"):
        folder_task(tmp_path / "imagenet")
    for name in ("boeing_737", "boeing_747"):
        paint(tmp_path / "planes" / f"label={name}.png", 1)
    with pytest.raises(TaskError, match="too few images"):
        folder_task(tmp_path / "planes")


def test_images_of_16_bits_are_scaled(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16)
    Image.fromarray(values.reshape(8, 8)).save(tmp_path / "wide.png")
    image = np.asarray(read_image(tmp_path / "wide.png", "wide"))
    assert image[..., 0].ravel().tolist() == [int(value / 256) for value in values]


def test_names_with_label_and_text(tmp_path: Path) -> None:
    for i in range(20):
        paint(tmp_path / f"label=coffee mug_text=ipod_{i}.png", i)
        paint(tmp_path / f"label=ipod_text=piggy_bank_{i}.jpg", i)
    task = folder_task(tmp_path)
    assert task.classes == ("coffee mug", "ipod", "piggy bank")
    labels = np.concatenate([task.load(split).labels for split in SPLITS])
    assert np.bincount(labels, minlength=3).tolist() == [20, 20, 0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds 0 images of 0 classes"),
        (["a/1.png"], "1 images of 1 classes"),
        (["test/a/1.png", "test/b/1.png"], "and no train"),
        (["train/a/1.png", "train/b/1.png"], "train and no test"),
        (["a/1.png", "b/1.png"], "too few images"),
        (["a/1.png", "loose.png"], "outside of any class: loose.png"),
        (["a/1.png", "label=b.png"], "give one of the two"),
    ],
)
def test_wrong_layouts(
    tmp_path: Path, files: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        paint(tmp_path / name, 1)
    with pytest.raises(TaskError, match=message):
        folder_task(tmp_path)
    assert run(["patch", "--task", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_wrong_prompts_and_images(tmp_path: Path) -> None:
    for i in range(30):
        paint(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    (tmp_path / "prompts.txt").write_text("a photo\n")
    with pytest.raises(TaskError, match=r"each with \{\} for the class; not 'a photo'"):
        folder_task(tmp_path)
    (tmp_path / "prompts.txt").unlink()
    task = folder_task(tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"not a picture")
    with pytest.raises(TaskError, match="is not an image"):
        task.load("train")[0]


def test_a_folder_is_evaluated_like_any_task(tmp_path: Path) -> None:
    shapes = find_task("shapes")
    images = shapes.load("test")
    for i in range(60):
        path = tmp_path / "own" / shapes.classes[images.labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images[i].save(path)
    result = evaluate("embedded", str(tmp_path / "own"), device="cpu")["own"]
    assert result["n"] == 12
    assert result["acc1"] > 0.9


def test_other_names_of_splits(tmp_path: Path) -> None:
    for j, split in enumerate(("Training", "dev", "Testing")):
        for i in range(20):
            paint(tmp_path / "set" / split / "ab"[i % 2] / f"{i}.png", 80 * j + i)
    task = folder_task(tmp_path / "set")
    assert dict(task.sizes) == {"train": 20, "validation": 20, "test": 20}
    assert {value // 80 for value, _ in contents(task, "validation")} == {1}


def test_a_split_that_is_not_understood(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "test", "holdout"):
        for i in range(20):
            paint(tmp_path / "one" / split / "ab"[i % 2] / f"{i}.png", i)
            paint(tmp_path / "two" / f"seg_{split}" / "ab"[i % 2] / f"{i}.png", i)
    with pytest.raises(TaskError, match="beside test, train holdout, which is no split"):
        folder_task(tmp_path / "one")
    with pytest.raises(TaskError, match="seg_test, seg_train, which is no split"):
        folder_task(tmp_path / "two")
    (tmp_path / "one" / "holdout").rename(tmp_path / "one" / "unlabeled")
    folder_task(tmp_path / "one")
    assert "its pictures aren't used" in caplog.text


def test_a_class_that_one_split_has(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for i in range(4):
            paint(tmp_path / split / "ab"[i % 2] / f"{i}.png", i)
    paint(tmp_path / "val" / "images" / "0.png", 9)
    with pytest.raises(TaskError, match=r"images: only .*val has this class"):
        folder_task(tmp_path)
    (tmp_path / "test" / "images").mkdir()
    assert folder_task(tmp_path).classes == ("a", "b", "images")


def test_what_tools_leave_behind_is_no_picture(tmp_path: Path) -> None:
    for i in range(40):
        for place in ("", ".ipynb_checkpoints", "more/.cache", "thumbs", "__MACOSX", "@eaDir"):
            paint(tmp_path / "ab"[i % 2] / place / f"{i}.png", i)
    paint(tmp_path / "__MACOSX" / "a" / "0.png", 0)
    task = folder_task(tmp_path)
    assert task.classes == ("a", "b")
    assert sum(task.sizes.values()) == 40


def test_pictures_in_two_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for j, split in enumerate(("train", "val", "test")):
        for i in range(4):
            paint(tmp_path / split / "ab"[i % 2] / f"{i}.png", 50 * j + i)
    folder_task(tmp_path).load("test")
    assert not caplog.records
    paint(tmp_path / "test" / "a" / "copy.png", 2)
    folder_task(tmp_path).load("test")
    assert "has 1 pictures in two splits" in caplog.text


def test_files_that_are_no_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(20):
        paint(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "drawing.eps")
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "named.png", "EPS")
    task = folder_task(tmp_path)
    assert sum(task.sizes.values()) == 21
    assert "1 files in" in caplog.text
    assert "drawing.eps" in caplog.text
    with pytest.raises(TaskError, match="is not an image that can be read"):
        read_image(tmp_path / "a" / "named.png", "named")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_photographs_stand_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    from PIL import ImageOps

    path = tmp_path / f"photo.{kind}"
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    turned = np.asarray(read_image(path, "photo"))
    assert np.array_equal(turned[..., 0], expected)
    if kind == "png":  # Pillow turns TIFF on its own, also for CLIP_benchmark
        stored = np.asarray(read_image(path, "photo", upright=False))
        assert np.array_equal(stored[..., 0], pixels)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_32_bits(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.arange(64).reshape(8, 8).astype(dtype)).save(tmp_path / "wide.tif")
    with pytest.raises(TaskError, match="pixels of 32 bits, whose range isn't known"):
        read_image(tmp_path / "wide.tif", "wide")
