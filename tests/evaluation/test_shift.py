"""Accuracy under corruptions, and effective robustness."""

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
from weightops.tasks.corrupted import corrupted


def few(name: str = "shapes", n: int = 40) -> Task:
    """Return a task with the first images of another."""
    task = TASKS[name]
    images = task.load("validation")

    class Few:
        labels = images.labels[:n]

        def __len__(self) -> int:
            return n

        def __getitem__(self, index: int) -> Image.Image:
            return images[index]

    return Task(task.name, task.classes, task.templates, lambda split: Few(), task.sizes, "", "")


def test_shift_is_the_mean_over_corrupted_tasks() -> None:
    task, model = few("letters"), ImageModel.open("embedded", "cpu")
    result = shift(model, task, corruptions=["blur", "inversion"], severities=[1, 5])
    scores = [
        evaluate(model, corrupted(task, name, severity))[f"letters+{name}-{severity}"]["acc1"]
        for name in ("blur", "inversion")
        for severity in (1, 5)
    ]
    assert result["under_shift"] == pytest.approx(np.mean(scores))
    assert result["in_distribution"] == evaluate(model, task)["letters"]["acc1"]
    assert result["corruptions"]["inversion"]["5"] == scores[3]
    assert result["corruptions"]["blur"]["1"] > result["corruptions"]["blur"]["5"]
    with pytest.raises(OptionError, match="1 to 5, not 6"):
        shift(model, task, severities=[6])
    with pytest.raises(UnknownNameError, match="did you mean blur"):
        shift(model, task, corruptions=["blurr"])


def test_shift_of_any_function() -> None:
    result = shift(lambda task, split: float(len(task.name)), few("letters"), corruptions=["blur"])
    assert result["in_distribution"] == len("letters")
    assert result["under_shift"] == len("letters+blur-1")


def test_effective_robustness() -> None:
    def logistic(z: float) -> float:
        return 1 / (1 + math.exp(-z))

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
    base = open_checkpoint("embedded")
    negative = TaskVector("embedded", {n: -t for n, t in base.state_dict().items()})
    for name, drift in (("a", 0.2), ("b", 0.5)):
        (0.1 * drift * negative).apply(base).save(tmp_path / name)
    references = ["--reference", str(tmp_path / "a"), "--reference", str(tmp_path / "b")]
    shifted = ["evaluate", "--tasks", "few", "--evaluator", "shift", *references]
    assert run([*shifted, "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert np.isfinite(result["metrics"]["effective_robustness"])
    assert run(shifted) == 0
    assert "effective_robustness" in capsys.readouterr().out
    assert run(["evaluate", "--tasks", "few", "--reference", "embedded"]) == 2


def test_a_line_needs_two_references(capsys: pytest.CaptureFixture[str]) -> None:
    command = "evaluate --tasks digits --evaluator shift --reference embedded"
    assert run(command.split()) == 2
    assert "a line needs two models or more after --reference" in capsys.readouterr().err
