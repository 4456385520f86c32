"""The schema of methods, and what it refuses."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from helpers.merges import family
from torch import nn

from weightops import TaskVector
from weightops.algebra.names import Each
from weightops.errors import MismatchError, OptionError, UnknownNameError
from weightops.merging.merge import merge
from weightops.merging.methods.method import Option
from weightops.merging.methods.source import MethodSource
from weightops.merging.methods.table import METHODS


def test_schema_is_the_signature() -> None:
    assert METHODS["ties"].options["normalize"].choices == ("weights", "count", "none")
    assert METHODS["ties"].options["density"] == Option(float, 0.2, each=True)
    assert METHODS["ties"].summary.endswith("(TIES).")
    assert METHODS["linear"].options["normalize"] == Option(bool, True)


@pytest.mark.parametrize("name", METHODS)
def test_docstrings_are_pages_for_a_terminal(name: str) -> None:
    method = METHODS[name]
    text = inspect.getdoc(method.function) or ""
    assert method.summary == text.splitlines()[0]
    assert not set("\\$") & set(text)
    assert ":math:" not in text
    for parameter in inspect.signature(method.function).parameters:
        assert f"\n    {parameter}: " in text


def test_unknown_names_and_values(net: nn.Module) -> None:
    base, models = family(2)
    with pytest.raises(UnknownNameError, match="no merge method 'tise'\nhint: did you mean ties"):
        merge(models, "tise")
    with pytest.raises(UnknownNameError, match="option of ties 'densty'\nhint: did you mean dens"):
        merge(models, "ties", base=base, densty=0.2)
    with pytest.raises(UnknownNameError, match="'weights' or 'count' or 'none', not 'mean'"):
        merge(models, "ties", base=base, normalize="mean")
    with pytest.raises(UnknownNameError, match="no tensor that matches 'matrxi'"):
        merge(models, "ties", base=base, density={"matrxi": 0.5})
    with pytest.raises(OptionError, match="density of ties is a finite number, not 'a'"):
        merge(models, "ties", base=base, density=["a"])
    with pytest.raises(MismatchError, match="don't match"):
        merge([models[0], net], "linear")
    with pytest.raises(OptionError, match="nothing to merge"):
        merge([])


def test_values_that_a_method_does_not_take() -> None:
    base, models = family(2)
    for method, options, error, match in (
        ("tsv_m", {"weights": [1, 2]}, OptionError, "tsv_m takes no weights"),
        ("ties", {"density": "0.2"}, OptionError, "density of ties is a finite number, not '0.2'"),
        ("ties", {"density": None}, OptionError, "not None"),
        ("ties", {"normalize": {"*": "weigths"}}, UnknownNameError, "not 'weigths'"),
        ("linear", {"normalize": "no"}, OptionError, "true or false, not 'no'"),
        ("della", {"density": 0.95, "epsilon": 0.1}, OptionError, "outside of 0 to 1"),
        ("dare_linear", {"density": 1e-6}, OptionError, "keeps nothing"),
        (
            "tsv_m",
            {"stacked": Each((1, 3))},
            OptionError,
            r"one value for all models, not \[1, 3\]",
        ),
        ("ties", {"scope": {"*": Each("ab")}}, OptionError, "density may have one for each"),
    ):
        with pytest.raises(error, match=match):
            merge(models, method, base=None if method == "linear" else base, **options)["matrix"]
    kept = merge(models, "ties", base=base, density=np.float32(0.5))
    assert json.dumps(kept.form.sources[1].describe())
    one, two = (
        TaskVector(base, model).select(names)
        for model, names in zip(models, ("matrix", "*"), strict=True)
    )
    with pytest.raises(MismatchError, match="ties takes inputs with the same tensors"):
        MethodSource(METHODS["ties"], [one.form, two.form])
    with pytest.raises(MismatchError, match="float8_e4m3fn tensors, which can't be edited: w"):
        TaskVector({"w": torch.zeros(4)}, {"w": torch.ones(4)}).apply(
            {"w": torch.ones(4).to(torch.float8_e4m3fn)}, 0.5
        )
