"""Merge methods from outside of the package: registered, given as functions, and of plug-ins."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.plugins import install

import weightops
from weightops.errors import OptionError, UnknownNameError
from weightops.merging.methods.method import Method, Option
from weightops.merging.methods.table import METHODS, as_method

CODE = '''
import torch
from weightops.merging.methods.inputs import TensorInputs
from weightops.merging.methods.method import chunks


def halved_sum(deltas: torch.Tensor, *, strength: float = 0.5) -> torch.Tensor:
    """Add the deltas, and multiply the sum by a number."""
    return strength * deltas.sum(0)


def largest_magnitude(inputs: TensorInputs) -> float:
    return max(float(chunk.values.abs().max()) for chunk in inputs)


@chunks(largest=largest_magnitude)
def scaled(deltas: torch.Tensor, weights: torch.Tensor, largest: float) -> torch.Tensor:
    """Divide the weighted sum by the largest magnitude."""
    return (weights @ deltas) / largest
'''
BASE = {"w": torch.zeros(3)}
MODELS = [{"w": torch.tensor([1.0, 2.0, 4.0])}, {"w": torch.tensor([1.0, 0.0, -2.0])}]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module outside of the package, and a registry whose changes are undone."""
    monkeypatch.setattr(METHODS, "_table", dict(METHODS._table))
    (tmp_path / "outside_methods.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location(
        "outside_methods", tmp_path / "outside_methods.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_by_name_by_function_and_as_a_method(outside: ModuleType) -> None:
    assert weightops.method(outside.halved_sum) is outside.halved_sum
    assert METHODS["halved_sum"].options == {"strength": Option(float, 0.5)}
    for method in ("halved_sum", outside.halved_sum, as_method(outside.halved_sum)):
        merged = weightops.merge(MODELS, method, base=BASE)
        assert merged["w"].tolist() == [1.0, 1.0, 1.0]
        assert merged.form.sources[1].describe()["method"] == "halved_sum"
    merged = weightops.merge(MODELS, "halved_sum", base=BASE, strength={"w": 2})
    assert merged["w"].tolist() == [4.0, 4.0, 4.0]
    recipe = weightops.Recipe(("a", "b"), "halved_sum", options={"strength": 2.0})
    assert "method: halved_sum" in recipe.to_yaml()


def test_a_method_with_a_statistic(outside: ModuleType) -> None:
    merged = weightops.merge(MODELS, weightops.method(outside.scaled), base=BASE, weights=[1, 2])
    assert merged["w"].tolist() == [0.75, 0.5, 0.0]
    assert weightops.merge(MODELS, "scaled", base=BASE)["w"].tolist() == [0.5, 0.5, 0.5]


def test_names_and_functions_that_are_refused(outside: ModuleType) -> None:
    weightops.method(outside.halved_sum)
    with pytest.raises(OptionError, match="merge method 'halved_sum' already"):
        weightops.method(outside.halved_sum)
    with pytest.raises(UnknownNameError, match="no merge method 'halved'"):
        as_method("halved")
    with pytest.raises(OptionError, match="a merge method is a name or a function, not 3"):
        as_method(3)  # type: ignore[arg-type]

    def positional(deltas: torch.Tensor, strength: float = 0.5) -> torch.Tensor:
        return deltas.sum(0) * strength

    with pytest.raises(
        OptionError, match=r"'strength', which no merge fills\nhint: .*\*, strength"
    ):
        weightops.merge(MODELS, positional, base=BASE)

    def without_default(deltas: torch.Tensor, *, strength: float) -> torch.Tensor:
        return deltas.sum(0) * strength

    with pytest.raises(OptionError, match="option strength of without_default has no default"):
        Method("without_default", without_default)


def test_entry_points(tmp_path: Path) -> None:
    """A package's functions and methods are found under the names of its entry points."""
    points = {"plain": "halved_sum", "divided": "scaled", "broken": "largest_magnitude"}
    folder = install(tmp_path, "outside_methods", CODE, {"weightops.methods": points})
    code = (
        "import json, torch, weightops\n"
        "base = {'w': torch.zeros(3)}\n"
        "model = {'w': torch.tensor([1.0, 2.0, 4.0])}\n"
        "merged = {m: weightops.merge([model], m, base=base) for m in ('plain', 'divided')}\n"
        "print(json.dumps({m: checkpoint['w'].tolist() for m, checkpoint in merged.items()}))\n"
        "print(weightops.METHODS['plain'].name, 'broken' in list(weightops.METHODS))\n"
    )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    merged, names = done.stdout.splitlines()
    assert json.loads(merged) == {"plain": [0.5, 1.0, 2.0], "divided": [0.25, 0.5, 1.0]}
    assert names == "plain False"
    assert "'broken' can't be loaded from outside_methods: OptionError" in done.stderr
