"""Recipes of mergekit's that can't be: one error each, which names the line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_transformers import MODELS

from weightops.errors import WeightopsError
from weightops.merging.recipe import Recipe

pytest.importorskip("transformers")

MEAN = """\
models:
- model: DIR/a
  parameters: {weight: 1}
- model: DIR/b
  parameters: {weight: 1}
merge_method: linear
"""
TIES = MEAN.replace("linear", "ties").replace("weight: 1", "weight: 1, density: 0.5")
SLERP = """\
models:
- model: DIR/a
- model: DIR/b
merge_method: slerp
base_model: DIR/a
parameters:
  t: 0.5
"""


SLICE = """\
slices:
- sources:
  - {model: DIR/a, layer_range: [0, 2]}
  - model: DIR/b
    layer_range: [0, 2]
merge_method: slerp
base_model: DIR/a
parameters: {t: 0.5}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a and b, which are Llamas; other, which is none; and lora, of a Llama."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        MODELS["llama"].build(seed).save_pretrained(folder / name)
    MODELS["gpt_neox"].build(0).save_pretrained(folder / "other")
    adapted = get_peft_model(MODELS["llama"].build(0), LoraConfig(r=2, target_modules=["o_proj"]))
    adapted.save_pretrained(folder / "lora")
    return folder


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (MEAN.replace("DIR/b", "nope") + "tokenizer_source: union\n", "line 4: there is no file"),
        (TIES + "base_model: nope\ntokenizer_source: base\n", "line 7: there is no file"),
        (MEAN + "tokenizer_source: onion\n", "line 7: 'onion' is not a tokenizer's source"),
        (MEAN + "tokenizer: {source: union}\ntokenizer_source: base\n", "line 7: tokenizer_source"),
        (MEAN.replace("DIR/b", "DIR/other+DIR/lora"), "line 4: .*other and .*lora don't match"),
        (MEAN.replace("DIR/b", "DIR/other"), "line 6: .* don't match"),
        (MEAN.replace("weight: 1", "weight: heavy", 1), "line 3: weight is 'heavy', and must"),
        (MEAN.replace("weight: 1", "weight: .nan", 1), "line 3: weight is nan, and must"),
        (MEAN.replace("weight: 1", "weight: 0"), "line 6: the weights of an average must not"),
        (MEAN + "dtype: float17\n", "line 7: there is no dtype to write 'float17'"),
        (MEAN + "slices: [{sources: [{model: DIR/a}]}]\n", "line 7: exactly one of models"),
        (MEAN + "---\n" + MEAN, "line 13: of several recipes"),
        (MEAN.replace("weight: 1", "weight:", 1), "line 3: weight has None for a value"),
        (TIES.replace("0.5", "-1", 1) + "base_model: DIR/b\n", "line 3: density is a fraction"),
        (TIES.replace("0.5", "[0, 2]", 1) + "base_model: DIR/b\n", "line 3: density is a fraction"),
        (TIES + "base_model: DIR/a\nparameters: {lambda: big}\n", "line 8: lambda is 'big', and"),
        (SLERP.replace("0.5", "half"), "line 7: t is 'half', and must be a finite number"),
        (SLERP.replace("merge_method: slerp\n", ""), "line 5: a recipe with parameters is one"),
        (SLERP.replace("  t: 0.5", "\tt: 0.5"), "in line 7: found character"),
        (MEAN.replace("merge_method: linear", "merge_method"), "not valid YAML, in line"),
        ("models:\nmerge_method: linear\n", "line 1: exactly one of models"),
        (f"name: x\n{MEAN}---\nname: x\n{MEAN}---\n{MEAN}", "line 9: two recipes have the name x"),
        (SLICE.replace("[0, 2]", "[2, 0]"), r"line 3: layer_range is \[2, 0\]"),
        (SLICE.replace("    layer_range: [0, 2]\n", ""), "line 4: a source has no layer_range"),
        ("slices:\n- model: DIR/a\nmerge_method: passthrough\n", "line 2: an entry of slices has"),
        (
            "models: [{model: DIR/a}]\nmerge_method: model_stock\nbase_model: DIR/b\n",
            "line 3: model_stock takes base_model and at least 2 models beside it",
        ),
        (SLERP.replace("parameters:\n  t: 0.5\n", ""), "slerp needs t"),
        (SLERP.replace("0.5", "[{filter: mlp, value: 0.5}]"), "line 7: no filter of t gives"),
        (
            MEAN.replace("weight: 1", "weight: [{filter: mlp, value: 1}]", 1),
            "line 3: no filter of the weight of .*a gives a value for model.embed",
        ),
        (
            SLERP.replace("0.5", "[{filter: mlp, value: [{value: 1}]}, {value: 1}]"),
            "line 7: t has {'value': 1} for a value",
        ),
        (
            TIES.replace("ties", "sce") + "base_model: DIR/a\nparameters: {select_topk: -3}\n",
            "line 8: select_topk is a fraction",
        ),
    ],
)
def test_the_line_is_named(models: Path, text: str, match: str) -> None:
    file = models / "recipe.yml"
    file.write_text(text.replace("DIR", str(models)))
    with pytest.raises(WeightopsError, match=match):
        Recipe.read(file).merge()
