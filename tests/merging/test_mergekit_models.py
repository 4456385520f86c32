"""Models that differ in what lies around their layers: tied heads, dtypes, files beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from weightops import open_checkpoint, verify
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import RecipeError
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe

pytest.importorskip("transformers")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Llamas: tied, apart, half (in bf16) and wide, which has more tokens."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    for seed, (name, is_tied, rows) in enumerate(
        [("tied", True, 20), ("apart", False, 20), ("half", False, 20), ("wide", False, 24)]
    ):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            tie_word_embeddings=is_tied,
        )
        model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(max_length=seed + 9)
        dtype = torch.bfloat16 if name == "half" else torch.float32
        model.to(dtype).save_pretrained(folder / name)
        (folder / name / "chat_template.jinja").write_text(f"{{{{ {name!r} }}}}")
    return folder


def merged(models: Path, text: str) -> Checkpoint:
    (models / "recipe.yml").write_text(text.replace("DIR", str(models)))
    return Recipe.read(models / "recipe.yml").merge()


def loaded(checkpoint: Checkpoint, folder: Path) -> Any:
    """Save a checkpoint, and return it as transformers loads it, whole."""
    from transformers import AutoModelForCausalLM

    checkpoint.save(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return model


SLICES = """\
merge_method: passthrough
slices:
- sources: [{model: DIR/FIRST, layer_range: [0, 2]}]
- sources: [{model: DIR/LAST, layer_range: [1, 3]}]
"""


@pytest.mark.parametrize("first", ["tied", "apart"])
def test_tied_models_merge_with_untied_ones(models: Path, tmp_path: Path, first: str) -> None:
    last = "apart" if first == "tied" else "tied"
    tied, apart = (open_checkpoint(models / name) for name in ("tied", "apart"))
    text = f"merge_method: linear\nmodels: [{{model: DIR/{first}}}, {{model: DIR/{last}}}]\n"
    mean = merged(models, text + "parameters: {weight: 1}\n")
    model = loaded(mean, tmp_path / "out")
    assert torch.allclose(model.lm_head.weight, (tied[EMBEDDING] + apart[HEAD]) / 2)
    assert torch.allclose(model.model.embed_tokens.weight, (tied[EMBEDDING] + apart[EMBEDDING]) / 2)
    same = merge([str(models / first), str(models / last)])
    assert all(torch.equal(same[name], mean[name]) for name in mean)
    ties = merge([str(models / last)], "ties", base=str(models / first), density=1.0)
    assert torch.allclose(ties[HEAD], tied[EMBEDDING] if last == "tied" else apart[HEAD], atol=1e-7)


@pytest.mark.parametrize("first", ["tied", "apart"])
def test_tied_models_stack_with_untied_ones(models: Path, tmp_path: Path, first: str) -> None:
    last = "apart" if first == "tied" else "tied"
    begin, end = (open_checkpoint(models / name) for name in (first, last))
    model = loaded(
        merged(models, SLICES.replace("FIRST", first).replace("LAST", last)), tmp_path / "out"
    )
    assert torch.equal(model.model.embed_tokens.weight, begin[EMBEDDING])
    assert torch.equal(model.lm_head.weight, end[HEAD if last == "apart" else EMBEDDING])


def test_models_of_several_dtypes(models: Path) -> None:
    half, apart = (open_checkpoint(models / name) for name in ("half", "apart"))
    text = "merge_method: linear\nmodels: [{model: DIR/half}, {model: DIR/apart}]\n"
    result = merged(models, text + "parameters: {weight: 1}\n")
    assert result[HEAD].dtype == torch.float32
    assert torch.allclose(result[HEAD], (half[HEAD].float() + apart[HEAD]) / 2)
    own = Recipe.of({"models": [str(models / "half"), str(models / "apart")]}).merge()
    assert own[HEAD].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "body",
    [
        "models: [{model: DIR/half}, {model: DIR/apart}]\nmerge_method: linear\n"
        "parameters: {weight: 1}\n",
        "models: [{model: DIR/half}]\nmerge_method: slerp\nparameters: {t: 0.5}\n",
        SLICES.replace("FIRST", "half").replace("LAST", "apart"),
    ],
)
def test_base_model_gives_the_files_beside_the_weights(
    models: Path, tmp_path: Path, body: str
) -> None:
    recipe = body + "base_model: DIR/apart\ndtype: float32\n"
    loaded(merged(models, recipe), tmp_path / "out")
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (models / "apart" / name).read_text()
    depth = json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"]
    assert depth == (4 if "slices" in body else 3)
    assert verify(tmp_path / "out", inputs=[models]).holds


def test_a_model_of_another_size_gives_no_files(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slices = SLICES.replace("FIRST", "half").replace("LAST", "half")
    result = merged(models, slices + "base_model: DIR/wide\n")
    assert result.architecture is not None
    assert result.architecture.folder == models / "half"
    assert "whose tensors have other shapes: model.embed_tokens.weight (20, 16)" in caplog.text
    own = {"models": [str(models / "half")], "like": str(models / "wide")}
    with pytest.raises(RecipeError, match=r"can't have the configuration of .*wide"):
        Recipe.of(own).merge()


def test_words_and_numbers_that_mergekit_reads(models: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: DIR/half}, {model: DIR/apart}]\n"
    weights = "parameters: {weight: 0.75, normalize: VALUE}\n"
    half, apart = (open_checkpoint(models / name)[HEAD].float() for name in ("half", "apart"))
    for value in ('"false"', '"No"', "0.0", "false", '[{filter: lm, value: "off"}]'):
        result = merged(models, text + weights.replace("VALUE", value))
        assert torch.allclose(result[HEAD], 0.75 * (half + apart))
    with pytest.raises(RecipeError, match="line 3: normalize is 'maybe', and must be true or f"):
        merged(models, text + weights.replace("VALUE", '"maybe"'))
    for name, called in (("7", "7"), ("2024-01-31", "2024-01-31"), ("base-v2", "base-v2")):
        named = merged(models, f"name: {name}\n{text}parameters: {{weight: 1}}\n")
        assert named.recipe is not None
        assert named.recipe["name"] == called
    stacked = (
        SLICES.replace("FIRST", "half").replace("LAST", "half").replace("[1, 3]", '[1.0, "3"]')
    )
    assert "model.layers.3.mlp.up_proj.weight" in merged(models, stacked)


def test_a_filter_may_end_in_the_number_of_a_layer_of_the_source(models: Path) -> None:
    scale = "parameters: {scale: [{filter: layers.1, value: 0.5}, {value: 1}]}"
    text = SLICES.replace("FIRST", "apart").replace("LAST, layer_range: [1, 3]", "apart, RANGE")
    result = merged(models, text.replace("RANGE", f"layer_range: [0, 2], {scale}"))
    apart, name = open_checkpoint(models / "apart"), "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(result[name.format(2)], apart[name.format(0)])
    assert torch.equal(result[name.format(3)], 0.5 * apart[name.format(1)])
