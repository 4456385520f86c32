"""Corruptions, and what accuracy under them is compared with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weightops import TASKS, ImageModel, Task, TaskVector, evaluate, open_checkpoint
from weightops.cli.main import run
from weightops.errors import OptionError, UnknownNameError
from weightops.evaluation.shift import effective_robustness, shift
from weightops.tasks.corrupted import CORRUPTIONS, SEVERITIES, corrupted


def few(name: str = "shapes", n: int = 40) -> Task:
    """The first images of a task."""
    task = TASKS[name]
    images = task.load("validation")

    class Few:
        labels = images.labels[:n]

        def __len__(self) -> int:
            return n

        def __getitem__(self, index: int) -> Image.Image:
            return images[index]

    return Task(task.name, task.classes, task.templates, lambda split: Few(), task.sizes, "", "")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption(name: str) -> None:
    task = few()
    original = task.load("test")
    distances = []
    for severity in SEVERITIES:
        images = corrupted(task, name, severity).load("test")
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
    assert (np.asarray(CORRUPTIONS["inversion"](image, 2, rng)) != pixels).any(
        axis=(0, 2)
    ).sum() == 8
    flat = np.asarray(CORRUPTIONS["contrast"](image, 2, rng), float)
    assert np.allclose(flat, (pixels + pixels.mean()) / 2, atol=0.51)
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    assert np.asarray(CORRUPTIONS["noise"](grey, 1, rng), float).std() == pytest.approx(
        0.08 * 255, rel=0.05
    )
    assert np.array_equal(CORRUPTIONS["rotation"](grey, 3, rng), grey)
    assert np.array_equal(CORRUPTIONS["blur"](grey, 3, rng), grey)


def test_shift_is_the_mean_over_corrupted_tasks() -> None:
    task, clip = few("letters"), ImageModel.open("embedded", "cpu")
    result = shift(clip, task, corruptions=["blur", "inversion"], severities=[1, 5])
    scores = [
        evaluate(clip, corrupted(task, c, s))[f"letters+{c}-{s}"]["acc1"]
        for c in ("blur", "inversion")
        for s in (1, 5)
    ]
    assert result["under_shift"] == pytest.approx(np.mean(scores))
    assert result["in_distribution"] == evaluate(clip, task)["letters"]["acc1"]
    assert result["corruptions"]["inversion"]["5"] == scores[3]
    assert result["corruptions"]["blur"]["1"] > result["corruptions"]["blur"]["5"]
    named = shift(
        lambda task, split: float(len(task.name)), task, corruptions=["blur"]
    )  # any function will do
    assert named["in_distribution"] == len("letters")
    assert named["under_shift"] == len("letters+blur-1")
    with pytest.raises(OptionError, match="1 to 5, not 6"):
        shift(clip, task, severities=[6])
    with pytest.raises(UnknownNameError, match="did you mean blur"):
        shift(clip, task, corruptions=["blurr"])


def test_effective_robustness() -> None:
    logistic = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    line = [(logistic(z), logistic(0.5 * z - 1)) for z in (-1.0, 0.0, 2.0)]
    assert effective_robustness((logistic(1.5), logistic(-0.25)), line) == pytest.approx(0)
    assert effective_robustness((logistic(1.5), logistic(-0.25) + 0.1), line) == pytest.approx(0.1)
    assert math.isnan(effective_robustness((0.5, 0.5), line[:1]))


def test_evaluate_shift(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(TASKS, "_table", {**TASKS._table, "few": few()})
    assert run(["evaluate", "--tasks", "few", "--evaluator", "shift", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    expected = shift("embedded", few())
    assert result["metrics"]["acc1_under_shift"] == expected["under_shift"]
    assert result["metrics"]["acc1_under_corruption"] == expected["corruptions"]
    for name, drift in (("a", 0.2), ("b", 0.5)):
        vector = (
            0.1
            * drift
            * TaskVector(
                "embedded", {n: -t for n, t in open_checkpoint("embedded").state_dict().items()}
            )
        )
        vector.apply(open_checkpoint("embedded")).save(tmp_path / name)
    shifted = [
        "evaluate",
        "--tasks",
        "few",
        "--evaluator",
        "shift",
        "--reference",
        str(tmp_path / "a"),
        "--reference",
        str(tmp_path / "b"),
    ]
    assert run([*shifted, "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert np.isfinite(result["metrics"]["effective_robustness"])
    assert run(shifted) == 0
    assert "effective_robustness" in capsys.readouterr().out
    assert run(["evaluate", "--tasks", "few", "--reference", "embedded"]) == 2
