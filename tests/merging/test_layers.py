"""Layers of several models in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from weightops import open_checkpoint
from weightops.errors import RecipeError
from weightops.merging.merge import merge
from weightops.merging.mergekit import translate
from weightops.merging.recipe import Recipe


def test_layers_of_two_models_are_stacked(
    model_files: tuple[str, list[str]], tmp_path: Path
) -> None:
    base, models = model_files
    folders = []
    for i, path in enumerate((base, *models[:2])):
        folder = tmp_path / f"f{i}"
        open_checkpoint(path).save(folder)
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "model_type": "x"}))
        folders.append(str(folder))
    a, b, c = folders
    content: dict[str, object] = {
        "merge_method": "passthrough",
        "dtype": "float32",
        "slices": [
            {"sources": [{"model": a, "layer_range": [0, 2]}]},
            {"sources": [{"model": b, "layer_range": [1, 3]}]},
        ],
    }
    recipe = Recipe.of(translate(content))
    assert Recipe.of(recipe.to_dict()) == recipe
    recipe.merge().save(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 4
    out, one, two = open_checkpoint(tmp_path / "out"), open_checkpoint(a), open_checkpoint(b)
    assert len(out) == len(one) + 2
    for name, model, name_there in (
        ("embed.weight", one, "embed.weight"),
        ("norm.weight", two, "norm.weight"),
        ("layers.1.mlp.weight", one, "layers.1.mlp.weight"),
        ("layers.3.attn.weight", two, "layers.2.attn.weight"),
    ):
        assert torch.equal(out[name], model[name_there]), name
    sources = [
        [{"model": m, "layer_range": span, "parameters": {"weight": 0.5}} for m in (b, c)]
        for span in ([0, 1], [1, 3])
    ]
    content_of_two = {
        "merge_method": "task_arithmetic",
        "base_model": a,
        "slices": [{"sources": s} for s in sources],
    }
    mixed = Recipe.of(translate(content_of_two)).merge()
    plain = merge([b, c], "task_arithmetic", base=a, weights=[0.5, 0.5])
    assert all(torch.equal(mixed[name], plain[name]) for name in plain)
    content["slices"] = [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [2, 5]}]},
    ]
    with pytest.raises(RecipeError, match="has no layer 3, 4"):
        Recipe.of(translate(content)).merge()
    uneven = [{"model": a, "layers": [0, 1]}, {"model": b, "layers": [0, 2]}]
    with pytest.raises(RecipeError, match="equally many"):
        Recipe.of({"slices": [{"models": uneven}]})


def test_entries_of_a_configuration_for_each_layer_are_stacked(
    model_files: tuple[str, list[str]], tmp_path: Path
) -> None:
    folders = []
    for i, path in enumerate(model_files[1][:2]):
        folder = open_checkpoint(path).save(tmp_path / f"f{i}")
        kinds = [f"{'ab'[i]}{layer}" for layer in range(3)]
        (folder / "config.json").write_text(
            json.dumps({"n_layer": 3, "model_type": "x", "layer_types": kinds})
        )
        folders.append(str(folder))
    spans = zip(folders, ([0, 2], [1, 3]), strict=True)
    pieces = [
        {"method": "passthrough", "models": [{"model": folder, "layers": span}]}
        for folder, span in spans
    ]
    Recipe.of({"slices": pieces}).merge().save(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"n_layer": 4, "model_type": "x", "layer_types": ["a0", "a1", "b1", "b2"]}
