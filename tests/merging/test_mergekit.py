"""mergekit's recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from weightops import open_checkpoint
from weightops.errors import RecipeError, UnknownNameError
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe


def mergekit(tmp_path: Path, content: dict[str, object]) -> Recipe:
    (tmp_path / "mk.yaml").write_text(yaml.safe_dump(content))
    return Recipe.read(tmp_path / "mk.yaml")


def test_parameters_of_ties(model_files: tuple[str, list[str]], tmp_path: Path) -> None:
    base, models = model_files
    entries = [
        {"model": m, "parameters": {"density": d, "weight": w}}
        for m, d, w in zip(models, (0.5, 0.3, 0.3), (1, 2, 0.5), strict=True)
    ]
    content = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": base}, *entries],
        "dtype": "float32",
        "parameters": {"normalize": False, "int8_mask": True, "lambda": 0.7},
    }
    assert mergekit(tmp_path, content).to_dict() == {
        "method": "ties",
        "base": base,
        "models": [
            models[0],
            {"model": models[1], "weight": 2.0},
            {"model": models[2], "weight": 0.5},
        ],
        "alpha": 0.7,
        "options": {"density": {"each": [0.5, 0.3, 0.3]}, "normalize": "none"},
        "dtype": "float32",
    }


def test_a_gradient_and_a_filter(model_files: tuple[str, list[str]], tmp_path: Path) -> None:
    base, models = model_files
    sources = [{"model": model, "layer_range": [0, 3]} for model in (base, models[0])]
    content = {
        "merge_method": "slerp",
        "base_model": base,
        "slices": [{"sources": sources}],
        "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
    }
    recipe = mergekit(tmp_path, content)
    assert recipe.models == (base, models[0])
    merged = recipe.merge()
    one, two = open_checkpoint(base), open_checkpoint(models[0])
    assert torch.allclose(merged["layers.0.mlp.weight"], one["layers.0.mlp.weight"])
    assert torch.allclose(merged["layers.2.mlp.weight"], two["layers.2.mlp.weight"])
    plain = merge([base, models[0]], "slerp", t=0.5)
    assert torch.equal(merged["layers.2.attn.weight"], plain["layers.2.attn.weight"])
    assert torch.equal(merged["embed.weight"], plain["embed.weight"])


def test_scopes_and_slices(model_files: tuple[str, list[str]], tmp_path: Path) -> None:
    base, models = model_files
    entries = [
        {
            "model": models[0],
            "parameters": {"weight": 1.0, "density": [{"filter": "mlp", "value": 0.5}]},
        },
        {"model": models[1], "parameters": {"weight": [{"filter": "mlp", "value": 0.5}]}},
    ]
    content: dict[str, object] = {"merge_method": "ties", "base_model": base, "models": entries}
    with pytest.raises(RecipeError, match=r"no filter of the weight of .*m2.safetensors"):
        mergekit(tmp_path, content).merge()
    content["parameters"] = {
        "density": 0.3,
        "weight": 0.2,
        "lambda": [{"filter": "attn", "value": 2.0}],
    }
    recipe = mergekit(tmp_path, content)
    assert [*recipe.options["density"]] == [{"*mlp*": 0.5, "*": 0.3}, 0.3]
    assert recipe.weights == (1.0, {"*mlp*": 0.5, "*": 0.2})
    assert recipe.alpha == {"*attn*": 2.0, "*": 1.0}
    sources = [
        {"model": m, "layer_range": [0, 2], "parameters": {"weight": 0.5}} for m in models[:2]
    ]
    content = {"merge_method": "linear", "slices": [{"sources": sources}]}
    two_layers = mergekit(tmp_path, content).merge()
    assert [name for name in two_layers if "layers.2" in name] == []
    assert len(two_layers) == len(open_checkpoint(base)) - 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"merge_method": "tis"}, "line 2: there is no merge method of mergekit's 'tis'"),
        ({"chat_template": "chatlm"}, "line 2: 'chatlm' is no chat template"),
        ({"tokenizer": {"source": "union"}, "tokenizer_source": "base"}, "can't both be there"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "line 5: a is there twice"),
        ({"merge_method": "slerp", "base_model": None}, "slerp needs base_model"),
        ({"models": [{"model": "a"}]}, "a has no weight, which ties needs"),
        ({"base_model": None}, "ties needs base_model"),
        ({"models": None}, "exactly one of models, slices and modules"),
    ],
)
def test_refused_configurations(change: dict[str, object], match: str, tmp_path: Path) -> None:
    content = {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": "a", "parameters": {"weight": 1}}],
    }
    merged = {key: value for key, value in (content | change).items() if value is not None}
    with pytest.raises((RecipeError, UnknownNameError), match=match):
        mergekit(tmp_path, merged)
