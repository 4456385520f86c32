"""Splits of folders: layouts of known data sets, and what isn't understood."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.data_sets import paint

from weightops.errors import TaskError
from weightops.tasks.folder import folder_task
from weightops.tasks.split_names import lists_split, looks_like_split

WNIDS = ("n02", "n01", "n03")


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """Write a folder in the layout of Tiny-ImageNet; a picture's value is 40 for each class."""
    root = tmp_path / "tiny-imagenet-200"
    for k, wnid in enumerate(WNIDS):
        for i in range(20):
            paint(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 40 * k + i)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t1\t1\n")
    lines = []
    for i in range(9):
        paint(root / "val" / "images" / f"val_{i}.JPEG", 40 * (i % 3) + 30 + i // 3)
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    for i in range(6):
        paint(root / "test" / "images" / f"test_{i}.JPEG", 200 + i)
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    names = "n01\tgoldfish, Carassius auratus\nn02\tcrane, a bird\nn03\tcrane\nn09\tother\n"
    (root / "words.txt").write_text(names)
    return root


def test_tiny_imagenet(tiny_imagenet: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = folder_task(tiny_imagenet)
    assert task.raw_classes == ("n01", "n02", "n03")
    assert task.classes == ("goldfish", "crane, a bird", "crane")
    assert dict(task.sizes) == {"train": 54, "validation": 6, "test": 9}
    assert "test has no classes: its pictures aren't used" in caplog.text
    for split in ("train", "test"):
        images = task.load(split)
        for i in range(len(images)):
            value = images[i].getpixel((0, 0))[0]
            assert WNIDS[round((value - 15) / 40)] == task.raw_classes[images.labels[i]]


def test_annotations_that_do_not_match(tiny_imagenet: Path) -> None:
    file = tiny_imagenet / "val" / "val_annotations.txt"
    whole = file.read_text()
    file.write_text(whole.replace("val_3.JPEG", "val_33.JPEG"))
    with pytest.raises(TaskError, match=r"don't match: val_3.JPEG, val_33.JPEG"):
        folder_task(tiny_imagenet)
    file.write_text(whole.replace("\t", " "))
    with pytest.raises(TaskError, match="isn't FILE<tab>CLASS"):
        folder_task(tiny_imagenet)
    file.write_text(whole.replace("n03", "n04"))
    with pytest.raises(TaskError, match=r"n03: only .*train has this class"):
        folder_task(tiny_imagenet)
    file.unlink()
    with pytest.raises(TaskError, match=r"n01, n02, n03: only .*train has this class, not .*val"):
        folder_task(tiny_imagenet)


def test_a_file_of_classes_beside_the_pictures(tiny_imagenet: Path) -> None:
    for picture in (tiny_imagenet / "val" / "images").iterdir():
        picture.rename(tiny_imagenet / "val" / picture.name)
    (tiny_imagenet / "val" / "images").rmdir()
    assert folder_task(tiny_imagenet).sizes["test"] == 9


def fill(root: Path, splits: tuple[str, ...], inner: str = "{label}") -> None:
    for j, split in enumerate(splits):
        for i in range(12):
            paint(root / split / inner.format(label="ab"[i % 2]) / f"{i}.png", 20 * j + i)


@pytest.mark.parametrize(
    "splits",
    [
        ("train", "evaluation"),
        ("train_set", "test_set"),
        ("train2017", "val2017"),
        ("trainset", "testset"),
        ("fold1", "fold2"),
        ("development_data", "holdout"),
        ("train", "val", "test", "test2"),
        ("Train", "train", "test"),
        ("train", "dev", "eval"),
        ("train", "query"),
        ("train", "test-A"),
    ],
)
def test_splits_that_are_refused(tmp_path: Path, splits: tuple[str, ...]) -> None:
    fill(tmp_path, splits)
    with pytest.raises(TaskError, match=r"no split that is understood|two folders for"):
        folder_task(tmp_path)


def test_pictures_of_no_class_in_a_split(tmp_path: Path) -> None:
    fill(tmp_path, ("train", "val"))
    for i in range(3):
        paint(tmp_path / "test" / f"{i}.png", i)
    with pytest.raises(TaskError, match=r"test holds pictures of no class"):
        folder_task(tmp_path)


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_folders_by_kind_are_no_classes(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        for kind in ("images", "annotations"):
            for i in range(12):
                paint(tmp_path / split / kind / "more" / f"{i}.png", i)
    with pytest.raises(TaskError, match=r"annotations, images, which seem to be no classes"):
        folder_task(tmp_path)


def test_a_file_that_lists_a_split(tmp_path: Path) -> None:
    fill(tmp_path, ("",))
    assert sum(folder_task(tmp_path).sizes.values()) == 12
    (tmp_path / "training_log.txt").write_text("loss 1")
    assert sum(folder_task(tmp_path).sizes.values()) == 12
    (tmp_path / "test.txt").write_text("a/0.png\n")
    with pytest.raises(TaskError, match=r"has test.txt, which isn't read"):
        folder_task(tmp_path)


def test_names_of_classes_are_no_splits() -> None:
    for name in ("trains", "valley", "contest", "deviled eggs", "evaluator bird"):
        assert not looks_like_split(name)
    assert not lists_split("classes.txt")


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    fill(tmp_path, ("train", "test"))
    (tmp_path / "test" / "a" / "annexed.png").symlink_to(tmp_path / "objects" / "1.png")
    with pytest.raises(TaskError, match=r"has 1 links that lead nowhere: annexed\.png"):
        folder_task(tmp_path)
