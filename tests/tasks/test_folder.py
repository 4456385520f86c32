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
from weightops.tasks.table import find_task
from weightops.tasks.task import PROMPTS, SPLITS, read_image


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
