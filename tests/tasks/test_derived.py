"""Tasks derived from others: attacks, parts, unions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from weightops import ImageModel, Task
from weightops.errors import TaskError
from weightops.tasks.derived import neutral, typographic, union, with_classes
from weightops.tasks.table import as_tasks, find_task


class LargeImages:
    """One image that isn't square."""

    labels = np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Image.Image:
        return Image.new("RGB", (300, 200), "navy")


def test_an_attack_names_a_wrong_class() -> None:
    clean = find_task("shapes")
    attacked, harmless = typographic(clean), neutral(clean)
    images, original = attacked.load("test"), clean.load("test")
    for i in (0, 1, 17):
        words = images.words(int(images.labels[i]))
        assert set(words) == set(clean.classes) - {clean.classes[images.labels[i]]}
        assert images.labels[i] == original.labels[i]
        difference = np.asarray(images[i], dtype=int) - np.asarray(original[i], dtype=int)
        changed = np.abs(difference).max(-1) > 40
        assert 0.005 < changed.mean() < 0.6
        assert np.array_equal(np.asarray(images[i]), np.asarray(attacked.load("test")[i]))
    assert not set(harmless.load("test").words(0)) & set(clean.classes)
    assert find_task("typographic:shapes").name == "typographic:shapes"


def test_an_attack_keeps_the_size_of_an_image() -> None:
    task = Task("large", ("x", "y"), ("{}",), lambda split: LargeImages(), {"test": 1}, "", "")
    assert typographic(task).load("test")[0].size == (300, 200)


def test_some_classes_of_a_task() -> None:
    task = find_task("colors")
    warm = with_classes(task, ("yellow", "red"), "warm")
    assert warm.classes == ("red", "yellow")
    images, all_images = warm.load("validation"), task.load("validation")
    assert [warm.classes[label] for label in images.labels] == [
        task.classes[label] for label in all_images.labels if task.classes[label] in warm.classes
    ]
    assert warm.sizes["validation"] == len(images)
    halves = [find_task(f"{half}:colors") for half in ("first-half", "second-half")]
    assert halves[0].classes + halves[1].classes == task.classes
    with pytest.raises(TaskError, match="no class mauve"):
        with_classes(task, ("mauve",), "x")


def test_union() -> None:
    tasks = as_tasks(["mnist", "digits", "fonts"])
    joint = union(tasks)
    assert union(tasks[:1]) is tasks[0]
    assert joint.name == "mnist+digits+fonts"
    assert len(joint.classes) == len(joint.prompts) == 14  # both tasks of digits have one set
    images = joint.load("validation")
    assert len(images) == len(images.labels) == joint.sizes["validation"] == 1300
    first = tasks[1].load("validation")
    assert np.array_equal(np.asarray(images[500]), np.asarray(first[0]))
    assert joint.classes[images.labels[500]] == tasks[1].classes[first.labels[0]]
    model = ImageModel.open("embedded", "cpu")
    heads = torch.cat([model.zero_shot_head(tasks[0]), model.zero_shot_head(tasks[2])])
    assert torch.allclose(model.zero_shot_head(joint), heads, atol=1e-4)
