"""Built-in tasks: fixed splits that never overlap, the same images every time."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
from helpers.hub_cache import python

from weightops import TASKS
from weightops.errors import MissingExtraError
from weightops.tasks.fonts import STYLES, faces
from weightops.tasks.rendered import SIZES
from weightops.tasks.table import EVALUATED
from weightops.tasks.task import SPLITS


def pictures(name: str, split: str) -> set[bytes]:
    images = TASKS[name].load(split)
    return {sha256(images[i].tobytes()).digest() for i in range(len(images))}


@pytest.mark.parametrize("name", EVALUATED)
def test_splits_never_overlap(name: str) -> None:
    train, validation, test = (pictures(name, split) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("name", EVALUATED)
def test_sizes_labels_and_prompts(name: str) -> None:
    task = TASKS[name]
    for split in SPLITS:
        images = task.load(split)
        assert len(images) == len(images.labels) == task.sizes[split]
        counts = np.bincount(images.labels, minlength=len(task.classes))
        assert counts.min() > 0
        assert counts.max() - counts.min() <= 0.1 * counts.max() + 1
    assert len(set(task.classes)) == len(task.classes)
    assert all(template.count("{}") == 1 for template in task.templates)
    assert task.source
    assert task.license


def test_enough_to_test_on() -> None:
    assert SIZES["test"] >= 1000


def test_no_font_is_in_two_splits() -> None:
    used = {
        split: {face.path for style in STYLES for face in faces(style, split)} for split in SPLITS
    }
    assert not used["train"] & used["validation"]
    assert not used["train"] & used["test"]
    assert not used["validation"] & used["test"]


def test_images_are_the_same_in_every_process() -> None:
    script = """
from hashlib import sha256
from weightops import TASKS
images = [TASKS[name].load("test")[i] for name in ("shapes", "words", "counting") for i in (0, 7)]
print(sha256(b"".join(image.tobytes() for image in images)).hexdigest())
"""
    assert python(script, PYTHONHASHSEED="0") == python(script, PYTHONHASHSEED="1")


def test_a_missing_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.tasks.fonts.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'weightops\[demo\]'"):
        TASKS["letters"].load("test")[0]
