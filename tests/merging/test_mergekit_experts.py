"""Experts in recipes of mergekit's: merged as one tensor of a layer, as transformers has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_transformers import MODELS

from weightops import open_checkpoint
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe

pytest.importorskip("transformers")

SLERP = """\
merge_method: slerp
base_model: DIR/a
models: [{model: DIR/a}, {model: DIR/b}]
parameters: {t: 0.3}
"""


@pytest.fixture(scope="module")
def mixtrals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtrals")
    for seed, name in enumerate("ab"):
        MODELS["mixtral"].build(seed).save_pretrained(folder / name)
    return folder


def read(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yml").write_text(text.replace("DIR", str(folder)))
    return Recipe.read(folder / "recipe.yml")


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def test_an_angle_is_of_all_experts_together(mixtrals: Path, tmp_path: Path) -> None:
    states = [loaded(mixtrals / name).state_dict() for name in "ab"]
    expected = merge(states, "slerp", t=0.3, parallel=0.9995)
    read(mixtrals, SLERP).merge().save(tmp_path / "out")
    found = loaded(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], expected[n], atol=1e-6) for n in found)
    own = merge([str(mixtrals / "a"), str(mixtrals / "b")], "slerp", t=0.3, parallel=0.9995)
    own.save(tmp_path / "own")
    apart = loaded(tmp_path / "own").state_dict()  # our own recipes merge each expert's matrices
    packed = [n for n in found if "experts" in n]
    assert packed
    assert all(not torch.allclose(found[n], apart[n], atol=1e-6) for n in packed)


def test_sums_keep_the_names_of_the_file(mixtrals: Path) -> None:
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: DIR/a}, {model: DIR/b}]"
    assert read(mixtrals, text).merge().specs == open_checkpoint(mixtrals / "a").specs


def test_filters_meet_the_names_in_memory(mixtrals: Path, tmp_path: Path) -> None:
    text = (
        "merge_method: linear\nmodels: [{model: DIR/a}]\n"
        "parameters: {normalize: false, weight: [{filter: mlp.experts, value: 0.5}, {value: 1}]}"
    )
    read(mixtrals, text).merge().save(tmp_path / "out")
    found, plain = loaded(tmp_path / "out").state_dict(), loaded(mixtrals / "a").state_dict()
    for name, tensor in found.items():
        scale = 0.5 if "mlp.experts" in name else 1.0
        assert torch.allclose(tensor, scale * plain[name]), name
