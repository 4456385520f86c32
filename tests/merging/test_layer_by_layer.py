"""RegMean++: Gram matrices at the inputs that the merged layers give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightops import ImageModel, Recipe, collect, merge, open_checkpoint
from weightops.checkpoints.matching import convert_to
from weightops.cli.main import run
from weightops.errors import OptionError, RecipeError
from weightops.merging.layer_by_layer import collect_layer_by_layer
from weightops.statistics.collect import grams_of, in_single_precision
from weightops.statistics.runs import on_images
from weightops.statistics.statistic import record_of
from weightops.tasks.table import find_task

TASKS = ("mnist", "digits")
COUNT = 6


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that are far from each other."""
    root, base = tmp_path_factory.mktemp("two"), open_checkpoint("embedded")
    files = []
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        state = {
            name: t + 0.1 * t.std() * torch.randn(t.shape, generator=generator)
            if name.startswith("visual.") and t.dim() > 1
            else t
            for name, t in base.state_dict().items()
        }
        model = base.with_form(open_checkpoint(state).form, base.architecture)
        files.append(model.save(root / f"m{i}"))
    return files


def test_layers_see_the_merged_layers_before_them(two: list[Path]) -> None:
    grams = collect_layer_by_layer(two, TASKS, images=COUNT)
    merged = merge(two, "regmean", statistics=[{"gram": g} for g in grams])
    state = merged.state_dict()
    layer = "visual.transformer.resblocks.2."
    for i, (file, task) in enumerate(zip(two, TASKS, strict=True)):
        hybrid = {
            name: state[name] if is_before(name) else tensor
            for name, tensor in open_checkpoint(file).state_dict().items()
        }
        model = ImageModel.open(file, "cpu")
        model.module.load_state_dict(hybrid)
        with in_single_precision(model.module):
            wanted = grams_of(on_images(model, find_task(task), "train", COUNT), COUNT)
        for name in (f"{layer}mlp.c_proj.weight", f"{layer}attn.in_proj_weight"):
            assert torch.allclose(grams[i][name], wanted[name].tensor, rtol=1e-3, atol=1e-5)
    plain = collect(two[0], "mnist", images=COUNT)
    first, later = "visual.conv1.weight", f"{layer}mlp.c_proj.weight"
    assert torch.allclose(grams[0][first], plain[first], rtol=1e-5)
    assert not torch.allclose(grams[0][later], plain[later], rtol=1e-2)
    assert record_of(grams[0])["task"] == "mnist"


def test_a_saved_one_says_what_it_is(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gram, _ = collect_layer_by_layer(two, TASKS, images=COUNT)
    file = gram.save(tmp_path / "a.gram.safetensors")
    assert run(["inspect", "--no-tensors", str(file)]) == 0
    assert f"by {COUNT} train images of mnist, after merged layers" in capsys.readouterr().out
    line = ["statistics", str(two[0]), "--task", "mnist", "--images", str(COUNT), "--resume"]
    assert run([*line, "-o", str(file)]) == 1
    assert "is of another run: taken after merged layers" in capsys.readouterr().err


def is_before(name: str) -> bool:
    """Return whether a tensor of the image encoder comes before its third layer."""
    stem = ("visual.conv1", "visual.class_emb", "visual.positional_emb", "visual.ln_pre")
    layers = tuple(f"visual.transformer.resblocks.{i}." for i in range(2))
    return name.startswith(stem + layers)


def test_it_is_a_word_in_a_recipe_and_in_any_names(two: list[Path], tmp_path: Path) -> None:
    grams = collect_layer_by_layer(two, TASKS, images=COUNT, ratio=0.7)
    merged = merge(two, "regmean", statistics=[{"gram": g} for g in grams], ratio=0.7)
    entries = [
        {"model": str(f), "statistics": {"gram": {"task": t, "images": COUNT, "after": "merged"}}}
        for f, t in zip(two, TASKS, strict=True)
    ]
    recipe = Recipe.of({"method": "regmean", "models": entries, "options": {"ratio": 0.7}})
    assert all(torch.equal(merged[name], t) for name, t in recipe.merge().items())
    folders = [convert_to(open_checkpoint(f), "transformers").save(tmp_path / f.name) for f in two]
    own = collect_layer_by_layer(folders, TASKS, images=COUNT, ratio=0.7)
    there = merge(folders, "regmean", statistics=[{"gram": g} for g in own], ratio=0.7)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    here = merged["visual.transformer.resblocks.1.mlp.c_fc.weight"]
    assert torch.allclose(there[name], here, atol=1e-5)


def test_refusals(two: list[Path]) -> None:
    with pytest.raises(OptionError, match="there are 2 models, and tasks for 1"):
        collect_layer_by_layer(two, ["mnist"])
    entries: list[dict[str, object]] = [
        {"model": str(two[0]), "statistics": {"gram": {"task": "mnist", "after": "merged"}}},
        {"model": str(two[1]), "statistics": {"gram": {"task": "mnist"}}},
    ]
    with pytest.raises(RecipeError, match="after: merged is for all models of a recipe"):
        Recipe.of({"method": "regmean", "models": entries}).merge()
    with pytest.raises(RecipeError, match="after is 'merged', not 'x'"):
        Recipe.of(
            {"models": [{"model": "a", "statistics": {"gram": {"task": "mnist", "after": "x"}}}]}
        )
