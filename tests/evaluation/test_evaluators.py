"""Evaluators and tasks by name and by object: built-in, registered, and from other packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_cache import python
from helpers.plugins import install

import weightops
from weightops import ImageModel, evaluate
from weightops.cli.main import run
from weightops.errors import OptionError, UnknownNameError
from weightops.evaluation.table import EVALUATORS, Evaluator, as_evaluator, evaluator

PLUGIN = """
from dataclasses import replace

import weightops
from weightops import ImageModel, Task
from weightops.tasks.table import TASKS


@weightops.evaluator
def size(model: ImageModel, task: Task, split: str) -> dict:
    return {"images": len(task.load(split))}


@weightops.evaluator(columns=("f1",), kind="f1_score")
def f1(model: ImageModel, task: Task, split: str, batch_size: int = 1) -> dict:
    return {"f1": 0.25, "precision": 0.5, "batch_size": batch_size, "n": 7}


def plain(model, task, split):
    return {"score": 0.5, "note": "a text"}


def few() -> Task:
    digits = TASKS["digits"]
    return replace(digits, name="few", load=lambda split: digits.load("validation"))


def other_name() -> Task:
    return replace(TASKS["digits"], name="another")


FEW_SHAPES = replace(TASKS["shapes"], name="few-shapes")
"""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the evaluators after a test."""
    monkeypatch.setattr(EVALUATORS, "_table", dict(EVALUATORS._table))


@pytest.mark.usefixtures("registry")
def test_a_decorated_function_has_a_name() -> None:
    def brightness(model: ImageModel, task: object, split: str) -> dict[str, Any]:
        return {"brightness": 0.5}

    assert evaluator(brightness) is brightness
    expected = {"digits": {"brightness": 0.5, "n": 500}}
    assert evaluate("embedded", "digits", evaluator="brightness") == expected
    assert evaluate("embedded", "digits", evaluator=brightness) == expected
    assert as_evaluator(brightness) is EVALUATORS["brightness"]
    assert as_evaluator(brightness).kind == "brightness"
    with pytest.raises(OptionError, match="evaluator 'brightness' already"):
        evaluator(brightness)


@pytest.mark.usefixtures("registry")
def test_columns_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    @weightops.evaluator(columns=("f1",), kind="f1_score")
    def macro_f1(model: ImageModel, task: object, split: str, batch_size: int) -> dict[str, Any]:
        return {"f1": 0.25, "precision": 0.5, "batch_size": batch_size, "n": 7}

    [scores] = evaluate("embedded", "digits", evaluator=macro_f1, batch_size=3).values()
    assert scores == {"f1": 0.25, "precision": 0.5, "batch_size": 3, "n": 7}
    assert run(["evaluate", "--tasks", "digits", "--evaluator", "macro_f1"]) == 0
    header, row, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "f1", "images", "source"]
    assert row.split()[:3] == ["digits", "25.0", "7"]
    assert run(["evaluate", "--tasks", "digits", "--evaluator", "macro_f1", "--json"]) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert record["task"] == "f1_score"


def test_objects_instead_of_names() -> None:
    def plain(model: ImageModel, task: object, split: str) -> dict[str, Any]:
        return {"score": 0.5, "note": "a text", "n": 3}

    named = Evaluator(plain, "mine")
    assert evaluate("embedded", "digits", evaluator=named)["digits"]["score"] == 0.5
    assert evaluate("embedded", "digits", evaluator=plain)["digits"]["score"] == 0.5
    assert named.columns_of({"score": 0.5, "note": "a text", "n": 3}) == ["score"]
    assert "plain" not in EVALUATORS
    with pytest.raises(OptionError, match="returned float, not metrics by name"):
        evaluate("embedded", "digits", evaluator=lambda model, task, split: 0.5)


def test_built_in_evaluators_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean linear_probe"):
        evaluate("embedded", "digits", evaluator="linear_prob")
    with pytest.raises(OptionError, match="zeroshot_retrieval has no details"):
        evaluate("embedded", "digits", evaluator="retrieval", details=True)
    command = ["evaluate", "--tasks", "textures", "--split", "validation", "--evaluator"]
    assert run([*command, "retrieval", "-o", str(tmp_path / "out")]) == 0
    assert "image_retrieval_recall@5" in capsys.readouterr().out
    [path] = (tmp_path / "out").iterdir()
    result = json.loads(path.read_text())
    assert result["task"] == "zeroshot_retrieval"
    assert run([*command, "retreival"]) == 2
    assert run([*command, "zero_shot", "--reference", "embedded"]) == 2
    assert run([*command, "shift", "--text", __file__]) == 2


def test_a_file_outside_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    script = """
import json, sys
sys.path.insert(0, sys.argv[0] or ".")
import mine
from weightops import evaluate, register_task

few = register_task(mine.few)
print(json.dumps([
    evaluate("embedded", "few", evaluator="size"),
    evaluate("embedded", [few, mine.FEW_SHAPES], evaluator=mine.size),
    evaluate("embedded", few, evaluator=mine.plain),
]))
"""
    by_name, by_object, plain = json.loads(python(script, PYTHONPATH=str(tmp_path)))
    assert by_name == {"few": {"images": 300, "n": 300}}
    assert by_object == {**by_name, "few-shapes": {"images": 1000, "n": 1000}}
    assert plain == {"few": {"score": 0.5, "note": "a text", "n": 300}}


def test_entry_points_of_an_installed_package(tmp_path: Path) -> None:
    points = {
        "weightops.evaluators": {"size": "size", "f1": "f1", "plain": "plain", "text": "__name__"},
        "weightops.tasks": {"few": "few", "few-shapes": "FEW_SHAPES", "renamed": "other_name"},
    }
    install(tmp_path, "plugin_of_tests", PLUGIN, points)
    script = """
import json
from weightops import EVALUATORS, TASKS, evaluate
from weightops.tasks.table import EVALUATED, find_task

names = EVALUATORS.names(), TASKS.names()
scores = evaluate("embedded", ["few", "few-shapes"], evaluator="size")
import plugin_of_tests
print(json.dumps({
    "names": names,
    "scores": scores,
    "f1": [EVALUATORS["f1"].kind, EVALUATORS["f1"].columns],
    "same": EVALUATORS["size"].function is plugin_of_tests.size,
    "derived": find_task("first-half:few").name,
    "default": EVALUATED,
    "tasks": list(TASKS),
    "evaluators": list(EVALUATORS),
    "unavailable": [TASKS.unavailable, EVALUATORS.unavailable],
}))
"""
    result = json.loads(python(script, PYTHONPATH=str(tmp_path)))
    assert {"size", "f1", "plain", "text"} < set(result["names"][0])
    assert {"few", "few-shapes", "renamed"} < set(result["names"][1])
    assert result["scores"]["few"] == {"images": 300, "n": 300}
    assert result["f1"] == ["f1_score", ["f1"]]
    assert result["same"]
    assert result["derived"] == "first-half:few"
    assert {"size", "f1", "plain"} < set(result["evaluators"])
    assert {"few", "few-shapes"} < set(result["tasks"])
    assert not {"few", "few-shapes"} & set(result["default"])
    task_errors, evaluator_errors = result["unavailable"]
    assert "called 'another', its entry point 'renamed'" in task_errors["renamed"]
    assert "a function is needed, not str" in evaluator_errors["text"]


def test_an_installed_package_may_be_imported_first(tmp_path: Path) -> None:
    points = {"weightops.evaluators": {"size": "size"}}
    install(tmp_path, "plugin_of_tests", PLUGIN, points)
    script = """
import plugin_of_tests
from weightops import evaluate
print(evaluate("embedded", "digits", evaluator="size")["digits"]["images"])
"""
    assert python(script, PYTHONPATH=str(tmp_path)).split() == ["500"]
