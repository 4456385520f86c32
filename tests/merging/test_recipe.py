"""Recipes: what they read, print and refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from weightops import open_checkpoint
from weightops.cli.main import run
from weightops.errors import RecipeError, UnknownNameError
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe


def test_a_recipe_is_what_it_prints(
    model_files: tuple[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    base, *models = (Path(path).name for path in (model_files[0], *model_files[1]))
    options = "--method dare_ties --density 0.4 --weights 1,2,3 --alpha 0.2,0.6 --seed 5"
    line = ["merge", *models, "--base", base, *options.split()]
    assert run([*line, "--print-recipe"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "r.yaml").write_text(text)
    assert Recipe.read(tmp_path / "r.yaml").to_yaml() == text
    assert run([*line, "-o", str(tmp_path / "a")]) == 0
    assert run(["merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "b")]) == 0
    a, b = (tmp_path / folder / "model.safetensors" for folder in "ab")
    assert a.read_bytes() == b.read_bytes()
    saved = open_checkpoint(tmp_path / "a")
    assert yaml.safe_dump(saved.source.made_from["recipe"], sort_keys=False) == text
    assert text.strip() in (tmp_path / "a/README.md").read_text()
    capsys.readouterr()
    assert run(["merge", *model_files[1], "-o", str(tmp_path / "c")]) == 0  # by absolute paths
    assert all(str(tmp_path).encode() not in file.read_bytes() for file in Path("c").iterdir())
    assert run(["inspect", str(tmp_path / "a")]) == 0
    assert "dare_ties" in capsys.readouterr().out


def test_settings_in_a_recipe(model_files: tuple[str, list[str]], tmp_path: Path) -> None:
    base, models = model_files
    content = {
        "method": "ties",
        "base": base,
        "models": [models[0], {"model": models[1], "weight": {"*.mlp.*": 2, "*": 1}}],
        "alpha": {"layers.*": [0.1, 0.5], "*": 0.3},
        "options": {"density": {"each": [0.5, {"embed.*": 1.0, "*": 0.2}]}, "normalize": "count"},
        "dtype": "bfloat16",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    recipe = Recipe.read(tmp_path / "r.yaml")
    assert Recipe.of(recipe.to_dict()) == recipe
    merged = recipe.merge()
    assert merged["norm.weight"].dtype == torch.bfloat16
    defaults = {"alpha": 0.3, "density": 0.2, "normalize": "count"}
    plain = merge(models[:2], "ties", base=base, weights=[1, 2], **defaults)
    assert not torch.equal(merged["layers.1.mlp.weight"], plain["layers.1.mlp.weight"].bfloat16())


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        (
            "method: ties\nmodel: [a]",
            UnknownNameError,
            "no recipe key 'model'\nhint: did you mean models",
        ),
        ("models: []", RecipeError, "needs models"),
        ("models: [{model: a, wieght: 1}]", UnknownNameError, "did you mean weight"),
        ("models: [a]\nalpha: many", RecipeError, "alpha is a number"),
        ("models: [a]\nalpha: .nan", RecipeError, "alpha is a number"),
        ("models: [a]\nmethod: tis", UnknownNameError, "did you mean ties"),
        (
            "models: [a]\nmethod: ties\noptions: {densty: 1}",
            UnknownNameError,
            "did you mean density",
        ),
        ("models: [a]\ndtype: int8", UnknownNameError, "no dtype to write 'int8'"),
        ("- a", RecipeError, "not a recipe"),
        ("a: [", RecipeError, "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", RecipeError, "not valid YAML"),
    ],
)
def test_refused_recipes(text: str, error: type[Exception], match: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(error, match=rf"r.yaml.*(?s:.)*{match}"):
        Recipe.read(tmp_path / "r.yaml")


def test_layers_and_dtypes_that_are_refused() -> None:
    entries = [{"model": "a", "layers": [0, 2]}]
    with pytest.raises(RecipeError, match="layers are of a slice"):
        Recipe.of({"models": entries})
    with pytest.raises(RecipeError, match="dtype is for the whole recipe"):
        Recipe.of({"slices": [{"models": entries, "dtype": "float16"}]})


def test_models_are_widened_where_a_dtype_is_given(
    model_files: tuple[str, list[str]], tmp_path: Path
) -> None:
    base, [one, two, _] = model_files
    half = str(open_checkpoint(one).save(tmp_path / "half.safetensors", dtype=torch.float16))
    options = {"density": 0.5}
    merged = Recipe((half, two), "ties", base=base, options=options, dtype="bfloat16").merge()
    widened = merge([open_checkpoint(half).to(torch.float32), two], "ties", base=base, density=0.5)
    widened = widened.to(torch.bfloat16)
    assert all(torch.equal(merged[name], widened[name]) for name in widened)
