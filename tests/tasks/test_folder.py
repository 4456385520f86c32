"""Tasks from folders of images, and tasks made from others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from weightops import ImageModel, Task, evaluate
from weightops.cli.main import run
from weightops.errors import TaskError, UnknownNameError
from weightops.tasks.derived import neutral, part_of, typographic, union
from weightops.tasks.folder import folder_task
from weightops.tasks.table import as_tasks, find_task
from weightops.tasks.task import PROMPTS, SPLITS, read_picture


def paint(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(path)


def contents(task: Task, split: str) -> set[tuple[int, int]]:
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
    for path in (tmp_path / "val").rglob("*.png"):
        path.unlink()
    for folder in (tmp_path / "val").iterdir():
        folder.rmdir()
    (tmp_path / "val").rmdir()
    assert dict(folder_task(tmp_path).sizes) == {"train": 18, "validation": 2, "test": 6}


def test_folders_as_others_lay_them_out(tmp_path: Path) -> None:
    for i in range(40):
        paint(tmp_path / "deep" / "ab"[i % 2] / str(i % 3) / f"{i}.png", i)
        paint(tmp_path / "imagenet" / ("val" if i < 10 else "train") / "ab"[i % 2] / f"{i}.png", i)
        paint(tmp_path / "cifar" / ("train" if i % 2 else "truck") / f"{i}.png", i)
    assert sum(folder_task(tmp_path / "deep").sizes.values()) == 40
    assert dict(folder_task(tmp_path / "imagenet").sizes) == {
        "train": 27,
        "validation": 3,
        "test": 10,
    }
    assert folder_task(tmp_path / "cifar").classes == ("train", "truck")
    paint(tmp_path / "imagenet" / "valid" / "a" / "1.png", 1)
    with pytest.raises(TaskError, match="has two folders for validation: val and valid"):
        folder_task(tmp_path / "imagenet")
    for name in ("boeing_737", "boeing_747"):
        paint(tmp_path / "planes" / f"label={name}.png", 1)
    with pytest.raises(TaskError, match="too few images"):
        folder_task(tmp_path / "planes")
    wide = Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))
    wide.save(tmp_path / "wide.png")
    assert np.asarray(read_picture(tmp_path / "wide.png", "wide"))[..., 0].ravel().tolist() == [
        int(v / 256) for v in np.linspace(0, 65535, 64).astype(np.uint16)
    ]


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
def test_wrong_folders(
    tmp_path: Path, files: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        paint(tmp_path / name, 1)
    with pytest.raises(TaskError, match=message):
        folder_task(tmp_path)
    assert run(["patch", "--task", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_more_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is no folder"):
        find_task("./no/such/folder")
    with pytest.raises(UnknownNameError, match="did you mean mnist"):
        find_task("typographic:mnits")
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


def test_an_attack_names_a_wrong_class() -> None:
    clean = find_task("shapes")
    attacked, harmless = typographic(clean), neutral(clean)
    images = attacked.load("test")
    original = clean.load("test")
    for i in (0, 1, 17):
        words = images.words(int(images.labels[i]))
        assert set(words) == set(clean.classes) - {clean.classes[images.labels[i]]}
        assert images.labels[i] == original.labels[i]
        changed = (
            np.abs(np.asarray(images[i], dtype=int) - np.asarray(original[i], dtype=int)).max(-1)
            > 40
        )
        assert 0.005 < changed.mean() < 0.6
        assert np.array_equal(np.asarray(images[i]), np.asarray(attacked.load("test")[i]))
    assert not set(harmless.load("test").words(0)) & set(clean.classes)
    assert find_task("typographic:shapes").name == "typographic:shapes"
    large = typographic(
        Task("large", ("x", "y"), ("{}",), lambda split: Large(), {"test": 1}, "", "")
    )
    assert large.load("test")[0].size == (300, 200)


class Large:
    labels = np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Image.Image:
        return Image.new("RGB", (300, 200), "navy")


def test_parts() -> None:
    task = find_task("colors")
    some = part_of(task, ("yellow", "red"), "some")
    assert some.classes == ("red", "yellow")
    images, everything = some.load("validation"), task.load("validation")
    assert [some.classes[k] for k in images.labels] == [
        task.classes[k] for k in everything.labels if task.classes[k] in some.classes
    ]
    assert some.sizes["validation"] == len(images)
    halves = [find_task(f"{half}:colors") for half in ("first-half", "second-half")]
    assert halves[0].classes + halves[1].classes == task.classes
    with pytest.raises(TaskError, match="no class mauve"):
        part_of(task, ("mauve",), "x")


def test_union() -> None:
    tasks = as_tasks(["mnist", "digits", "fonts"])
    joint = union(tasks)
    assert union(tasks[:1]) is tasks[0]
    assert joint.name == "mnist+digits+fonts"
    assert len(joint.classes) == len(joint.prompts) == 14  # the digits of both are the same classes
    images = joint.load("validation")
    assert len(images) == len(images.labels) == joint.sizes["validation"] == 1300
    first = tasks[1].load("validation")
    assert np.array_equal(np.asarray(images[500]), np.asarray(first[0]))
    assert joint.classes[images.labels[500]] == tasks[1].classes[first.labels[0]]
    clip = ImageModel.open("embedded", "cpu")
    heads = torch.cat([clip.zero_shot_head(tasks[0]), clip.zero_shot_head(tasks[2])])
    assert torch.allclose(clip.zero_shot_head(joint), heads, atol=1e-4)


def test_a_folder_is_evaluated_like_any_task(tmp_path: Path) -> None:
    shapes = find_task("shapes").load("test")
    names = find_task("shapes").classes
    for i in range(60):
        path = tmp_path / "own" / names[shapes.labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes[i].save(path)
    result = evaluate("embedded", str(tmp_path / "own"), device="cpu")["own"]
    assert result["n"] == 12
    assert result["acc1"] > 0.9
