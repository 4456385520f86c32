"""Corruptions of images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from weightops import TASKS
from weightops.errors import OptionError, UnknownNameError
from weightops.tasks.corrupted import CORRUPTIONS, SEVERITIES, corrupted


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption(name: str) -> None:
    task = TASKS["shapes"]
    original = task.load("validation")
    distances = []
    for severity in SEVERITIES:
        images = corrupted(task, name, severity).load("validation")
        assert np.array_equal(images.labels, original.labels)
        pairs = [
            (np.asarray(images[i], float), np.asarray(original[i].convert("RGB"), float))
            for i in range(20)
        ]
        assert all(a.shape == b.shape for a, b in pairs)
        assert np.array_equal(images[3], images[3])  # the same every time
        distances.append(np.mean([np.abs(a - b).mean() for a, b in pairs]))
    assert distances[0] > 0
    assert distances[-1] > 1.5 * distances[0]
    if name != "rotation":  # a shape may be symmetric
        assert distances == sorted(distances)


def test_exact_corruptions() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (10, 20, 3), dtype=np.uint8))
    pixels = np.asarray(image, float)
    assert np.array_equal(CORRUPTIONS["inversion"](image, 5, rng), 255 - pixels)
    inverted = np.asarray(CORRUPTIONS["inversion"](image, 2, rng)) != pixels
    assert inverted.any(axis=(0, 2)).sum() == 8
    flat = np.asarray(CORRUPTIONS["contrast"](image, 2, rng), float)
    assert np.allclose(flat, (pixels + pixels.mean()) / 2, atol=0.51)
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noisy = np.asarray(CORRUPTIONS["noise"](grey, 1, rng), float)
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.05)
    assert np.array_equal(CORRUPTIONS["rotation"](grey, 3, rng), grey)
    assert np.array_equal(CORRUPTIONS["blur"](grey, 3, rng), grey)


def test_wrong_arguments() -> None:
    with pytest.raises(OptionError, match="1 to 5, not 6"):
        corrupted(TASKS["shapes"], "blur", 6)
    with pytest.raises(UnknownNameError, match="did you mean blur"):
        corrupted(TASKS["shapes"], "blurr", 1)
