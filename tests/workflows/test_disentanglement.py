"""The disentanglement error, against predictions that are compared one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from weightops import TaskVector, config_for, finetune, open_checkpoint
from weightops.cli.main import run
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.zero_shot import predict
from weightops.tasks.table import as_tasks
from weightops.workflows.disentanglement import disentanglement


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two fine-tuned models, from a base that all of them refer to."""
    folder = tmp_path_factory.mktemp("disentanglement")
    found = {}
    for task in ("mnist", "digits"):
        config = config_for("embedded", steps=3, batch_size=16)
        finetune("embedded", task, config, out=folder / task, device="cpu")
        found[task] = str(folder / task)
    return found


def test_the_error_is_what_changes(files: dict[str, str]) -> None:
    tasks, alphas = as_tasks(["mnist", "digits"]), (0.0, 1.0, 2.0)
    found = disentanglement("embedded", list(files.values()), tasks, alphas=alphas, images=8)
    base = open_checkpoint("embedded")
    one, two = (TaskVector(base, file) for file in files.values())

    def guesses(vector: TaskVector, place: int) -> torch.Tensor:
        model = ImageModel.open(vector.apply(base), "cpu")
        return predict(model, tasks[place], "validation", only=np.arange(8))[:, 0]

    for i, a in enumerate(alphas):
        for j, b in enumerate(alphas):
            both = one * a + two * b
            pairs = [(guesses(v, t), guesses(both, t)) for t, v in enumerate((one * a, two * b))]
            expected = sum(float((alone != added).double().mean()) for alone, added in pairs)
            assert float(found.errors[i, j]) == pytest.approx(expected), (a, b)
    assert float(found.errors[0, 0]) == 0


def test_on_the_command_line(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    asked = ["compare", *files.values(), "--base", "embedded", "--tasks", "mnist,digits"]
    asked += ["--images", "2"]
    assert run([*asked, "-o", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["disentanglement"]
    assert record["tasks"] == ["mnist", "digits"]
    assert len(record["errors"]) == len(record["alphas"]) == 9
    assert out.stat().st_size > 10_000


def test_refusals(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="there are 2 vectors and 1 tasks"):
        disentanglement("embedded", list(files.values()), ["mnist"])
    asked = ["compare", *files.values(), "--base", "embedded", "--tasks", "mnist"]
    assert run(asked) == 2
    assert "2 vectors and 1 tasks" in capsys.readouterr().err
