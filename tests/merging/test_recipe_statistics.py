"""What recipes say of statistics that are made for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weightops.cli.main import run
from weightops.errors import OptionError, UnknownNameError, WeightopsError
from weightops.merging.layer_by_layer import collect_layer_by_layer
from weightops.merging.recipe import Recipe

RECIPE = """
method: {method}
models:
- model: embedded
  weight: 2
  statistics:
    {kind}: {given}
- model: embedded
  statistics: {{{kind}: {other}}}
"""


@pytest.mark.parametrize("after", [", after: merged", ""])
@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ("task: mnist, images: [64, 3]", "images is [64, 3], and must be an integer at least 1"),
        ("task: mnist, images: -3", "images is -3, and must be an integer at least 1"),
        ("task: mnist, images: true", "images is True, and must be an integer at least 1"),
        ("task: mnist, split: tran", "there is no split 'tran'"),
        ("task: [mnist]", "task is ['mnist'], and must be a name"),
        ("task: mnits", "there is no task 'mnits'"),
        ("task: mnist, labels: true", "labels: true is for fisher, not for gram"),
        ("images: 3", "gram is of one task"),
    ],
)
def test_values_are_refused_alike_after_merged_layers_and_without(
    given: str, fact: str, after: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused("regmean", "gram", f"{{{given}{after}}}", fact, tmp_path, capsys)


@pytest.mark.parametrize(
    ("method", "kind", "given", "fact"),
    [
        ("regmean", "gram", "{task: mnist, after: mergd}", "after is 'merged', not 'mergd'"),
        ("regmean", "gram", "{task: mnist, after: true}", "after is 'merged', not True"),
        ("regmean", "gram", "{text: a, after: merged}", "gram is of one task, and there is text"),
        ("regmean", "gram", "3", "gram is a ref or a mapping"),
        ("regmean", "grm", "a", "there is no kind of statistic 'grm'"),
        ("fisher", "fisher", "{task: mnist, after: merged}", "after: merged is for gram"),
        ("fisher", "fisher", "{task: mnist, labels: tru}", "there is no labels 'tru'"),
    ],
)
def test_what_a_statistic_cannot_be(
    method: str,
    kind: str,
    given: str,
    fact: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_refused(method, kind, given, fact, tmp_path, capsys)


def check_refused(
    method: str,
    kind: str,
    given: str,
    fact: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(method=method, kind=kind, given=given, other=given))
    assert run(["merge", str(file), "-o", str(tmp_path / "out")]) == 2
    assert f"r.yaml: line 7: {fact}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_true_is_a_word_of_labels(tmp_path: Path) -> None:
    file, given = tmp_path / "r.yaml", "{task: mnist, images: 2, labels: true}"
    file.write_text(RECIPE.format(method="fisher", kind="fisher", given=given, other=given))
    statistics = Recipe.read(file).statistics
    assert statistics is not None
    assert statistics[0]["fisher"]["labels"] == "true"
    Recipe.read(file).merge()


@pytest.mark.parametrize(
    ("method", "second", "fact"),
    [
        ("linear", {"gram": {"task": "mnist"}}, "linear takes no statistics"),
        ("regmean", {"fisher": "file"}, "takes the statistics gram, and b has fisher"),
        ("regmean", {}, "regmean takes the statistics gram, and b has none"),
        ("regmean", "file", "statistics is a mapping"),
    ],
)
def test_statistics_that_a_method_does_not_take(method: str, second: Any, fact: str) -> None:
    first = {} if method == "linear" else {"statistics": {"gram": "file"}}
    models = [{"model": "a", **first}, {"model": "b", "statistics": second}]
    with pytest.raises(WeightopsError, match=fact) as caught:
        Recipe.of({"method": method, "models": models})
    assert "statistics=" not in caught.value.hint


def test_arguments_of_grams_layer_by_layer() -> None:
    two = ["embedded", "embedded"]
    with pytest.raises(OptionError, match="images is -3, and must be an integer at least 1"):
        collect_layer_by_layer(two, ["mnist", "digits"], images=-3)
    with pytest.raises(UnknownNameError, match="there is no split 'tran'"):
        collect_layer_by_layer(two, ["mnist", "digits"], split="tran")  # type: ignore[arg-type]
