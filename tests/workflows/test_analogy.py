"""Analogies: a vector from three others."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.drawn_folders import draw

from weightops import analogy
from weightops.errors import NothingSatisfiesError, TaskError
from weightops.search.session import EditSession
from weightops.tasks.analogy_example import ANALOGY
from weightops.workflows.analogy import Analogy


def test_the_edit_is_the_analogy(own: Path, options: dict[str, object], tmp_path: Path) -> None:
    draw(tmp_path / "target", {"diamond": "diamond", "circle": "circle"}, 12, 3)
    tasks = [str(own / name) for name in ("plain", "swapped", "turned")]
    given = [own / "swapped.safetensors", own / "turned.safetensors", own / "turned.safetensors"]
    workflow = Analogy.from_call(
        *tasks, str(tmp_path / "target"), shared=True, finetuned=given, **options
    )
    session = EditSession(workflow.checkpoint, workflow.tasks, device="cpu")
    a, b, c = workflow.vectors(session)
    assert [task.name for task in workflow.learned] == ["plain", "swapped", "turned"]
    try:
        result = workflow.find(session)
    except NothingSatisfiesError:
        return  # unrelated vectors need not help
    assert result.edit.cosine(c + b - a) == pytest.approx(1)


def test_the_built_in_example() -> None:
    assert [task.name for task in ANALOGY] == [
        "letters a-m",
        "striped letters a-m",
        "letters n-z",
        "striped letters n-z",
    ]
    assert [len(task.classes) for task in ANALOGY] == [13] * 4


def test_refusals(own: Path) -> None:
    with pytest.raises(TaskError, match="four different tasks"):
        analogy("mnist", "digits", "letters", "letters", own / "x")
