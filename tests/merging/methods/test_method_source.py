"""The lazy result of a method: settings by tensor, and metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.merges import family, same

from weightops import open_checkpoint
from weightops.algebra.names import Each, depths
from weightops.errors import MethodError, OptionError
from weightops.merging.merge import merge
from weightops.merging.methods.method import chunks, combination


def test_settings_by_pattern_and_depth() -> None:
    names = ["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "head.weight"]
    base = {name: torch.zeros(4) for name in names}
    models = [{name: torch.ones(4) for name in names}]
    by_depth = merge(models, "task_arithmetic", base=base, alpha=[0.1, 0.5])
    assert [round(by_depth[n][0].item(), 6) for n in names] == [0.1, 0.1, 0.3, 0.5, 0.5]
    lines = merge(models, "task_arithmetic", base=base, alpha={"lines": [0.1, 0.5]})
    assert [round(lines[n][0].item(), 6) for n in names] == [0.1, 0.1, 0.3, 0.5, 0.1]
    nested = {"*.w": {"lines": [0.1, 0.5]}, "*": 7}
    inside = merge(models, "task_arithmetic", base=base, alpha=nested)
    assert [round(inside[n][0].item(), 6) for n in names] == [7, 0.1, 0.3, 0.5, 7]
    with pytest.raises(OptionError, match="a list of numbers, not"):
        merge(models, "task_arithmetic", base=base, alpha={"lines": ["a"]})
    by_name = merge(
        models, "task_arithmetic", base=base, weights=[{"layers.*": [1, 3], "head.*": 7}]
    )
    assert [by_name[n][0].item() for n in names] == [1, 1, 2, 3, 7]
    by_model = merge(models * 2, "magnitude", base=base, density=Each((0.25, 1.0)))
    assert [int(by_model[n].sum()) for n in names] == [5] * 5
    with pytest.raises(
        OptionError, match=r"magnitude at embed\.weight: there are 1 inputs, and values for 2"
    ):
        merge(models, "magnitude", base=base, density=Each((0.25, 1.0)))["embed.weight"]
    by_name = merge(models, "magnitude", base=base, density={"layers.1.w": 0.5, "*": 1.0})
    assert [int(by_name[n].sum()) for n in names] == [4, 4, 2, 4, 4]


def test_depth_is_within_the_layers_that_there_are() -> None:
    assert depths([f"layers.{i}.w" for i in (2, 3, 4)]) == {
        "layers.2.w": 0.0,
        "layers.3.w": 0.5,
        "layers.4.w": 1.0,
    }


def test_saved_and_described(tmp_path: Path) -> None:
    base, models = family(3)
    merged = merge(models, "dare_ties", base=base, alpha=0.5, seed=7)
    path = merged.save(tmp_path / "merged.safetensors")
    saved = open_checkpoint(path)
    assert same(saved, merged)
    assert saved.source.made_from["terms"][1]["method"] == "dare_ties"
    again = merge(models, "dare_ties", base=base, alpha=0.5, seed=7)
    assert again.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def sum_of_rows(deltas: torch.Tensor) -> torch.Tensor:
    return deltas.sum(-1)


def nothing(deltas: torch.Tensor) -> None:
    deltas.zero_()


@chunks()
def all_inputs(deltas: torch.Tensor) -> torch.Tensor:
    return deltas


@combination("delta")
def one_coefficient(weights: torch.Tensor) -> torch.Tensor:
    return weights[:1]


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (sum_of_rows, r"sum_of_rows at matrix: the result has shape \(2, 6\), not \(6, 4\)"),
        (nothing, "nothing at matrix: the method returned NoneType, not a tensor"),
        (all_inputs, r"all_inputs at matrix: the result has shape \(2, 24\), not \(24,\)"),
        (one_coefficient, r"the result has shape \(1,\), not \(2,\)"),
    ],
)
def test_results_that_are_not_merged_tensors(method: Any, match: str) -> None:
    base, models = family(2)
    with pytest.raises(MethodError, match=match):
        merge(models, method, base=base)["matrix"]
