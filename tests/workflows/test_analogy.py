"""Analogies: a vector from three others."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.drawn_folders import draw

from weightops import TaskVector, analogy
from weightops.errors import OptionError
from weightops.search.session import EditSession, weighted_sum
from weightops.tasks.analogy_example import ANALOGY
from weightops.workflows.analogy import Analogy


@pytest.mark.parametrize("shared", [True, False])
def test_the_edit_is_the_analogy_and_its_rivals_are_searched_as_it_is(
    own: Path, options: dict[str, object], tmp_path: Path, shared: bool
) -> None:
    draw(tmp_path / "target", {"diamond": "diamond", "circle": "circle"}, 60, 3)
    tasks = [str(own / name) for name in ("plain", "swapped", "turned")]
    given = [own / "swapped.safetensors", own / "turned.safetensors", own / "turned.safetensors"]
    workflow = Analogy.from_call(
        *tasks, str(tmp_path / "target"), shared=shared, finetuned=given, **options
    )
    workflow.may_be_base = True  # unrelated vectors need not help
    session = EditSession(workflow.checkpoint, workflow.tasks, device="cpu")
    a, b, c = workflow.vectors(session)
    assert [task.name for task in workflow.learned] == ["plain", "swapped", "turned"]
    result = workflow.find(session)
    whole = weighted_sum(result.vectors, (1.0,) * len(result.vectors))
    assert whole.cosine(c + b - a) == pytest.approx(1)
    other = "one alpha each" if shared else "one alpha"
    assert set(result.more["rivals"]) == {"only B", "only C", "C + B", other}

    def accuracy(vector: TaskVector) -> float:
        scores = session.measure(vector, "validation", [workflow.target]).scores
        return float(scores["target"]["acc1"])

    for name, parts in (("only B", [b]), ("only C", [c]), ("C + B", [c, b])):
        ((rival, _),) = result.rivals[name]
        alphas = list(result.more["rivals"][name].values())
        expected = sum((v * x for v, x in zip(parts, alphas, strict=True)), parts[0] * 0.0)
        assert (rival - expected).norm() == pytest.approx(0, abs=1e-6)
        tried = [sum((v * x for v in parts), parts[0] * 0.0) for x in (0.0, 0.5, 1.0)]
        assert accuracy(rival) >= max(map(accuracy, tried))


def test_the_built_in_example() -> None:
    assert [task.name for task in ANALOGY] == [
        "letters a-m",
        "striped letters a-m",
        "letters n-z",
        "striped letters n-z",
    ]
    assert [len(task.classes) for task in ANALOGY] == [13] * 4


def test_refusals(own: Path) -> None:
    with pytest.raises(OptionError, match="four different tasks"):
        analogy("mnist", "digits", "letters", "letters", own / "x")
