"""A part of a model in the place that it has in the whole one: `fill_missing` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_transformers import MODELS

from weightops import open_checkpoint
from weightops.errors import RecipeError
from weightops.merging.recipe import Recipe

pytest.importorskip("transformers")


def text_model(whole: Any, place: Path, seed: int, **changes: Any) -> Any:
    """Save a language model like the one within a model."""
    import transformers

    config = transformers.LlamaConfig(**{**whole.config.text_config.to_dict(), **changes})
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(place)
    return model


def test_a_merge_of_language_models_in_the_model_that_sees(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    whole = MODELS["llava"].build(0)
    whole.save_pretrained(tmp_path / "whole")
    a, b = (text_model(whole, tmp_path / name, seed) for seed, name in enumerate("ab", 1))
    recipe = Recipe.of(
        {
            "models": [str(tmp_path / "a"), str(tmp_path / "b")],
            "fill_missing": str(tmp_path / "whole"),
        }
    )
    Recipe.of(recipe.to_dict()).merge().save(tmp_path / "out")
    loaded, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    means = {n: (t + b.state_dict()[n]) / 2 for n, t in a.state_dict().items()}
    found = loaded.state_dict()
    for name, tensor in whole.state_dict().items():
        text = name.replace("model.language_model.", "model.") if "language" in name else name
        expected = means.get(text, tensor)
        assert torch.allclose(found[name], expected, atol=1e-6), name
    assert found.keys() == whole.state_dict().keys()


def test_a_tower_of_images_has_its_place(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    whole = MODELS["llava"].build(0)
    whole.save_pretrained(tmp_path / "whole")
    torch.manual_seed(5)
    tower = CLIPVisionModel(whole.config.vision_config)
    tower.save_pretrained(tmp_path / "tower")
    filled = Recipe.of(
        {
            "method": "passthrough",
            "models": [str(tmp_path / "tower")],
            "fill_missing": str(tmp_path / "whole"),
        }
    ).merge()
    before = open_checkpoint(tmp_path / "whole")
    changed = [n for n in filled if not torch.equal(filled[n], before[n])]
    assert all("vision" in name for name in changed)
    assert len(changed) >= len(tower.state_dict()) / 2  # biases of 0 and norms of 1 are the same


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 3}, r"line 3: .*whole has no place for model\.layers\.2"),
        (
            {"vocab_size": 70},
            r"line 3: .* differ in shapes: .*embed_tokens.*\(70, 16\) / \(64, 16\)",
        ),
        ({"tie_word_embeddings": True}, "line 3: the head of .*part is its embeddings"),
    ],
)
def test_a_part_that_has_no_place_is_refused(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    whole = MODELS["llava"].build(0)
    whole.save_pretrained(tmp_path / "whole")
    text_model(whole, tmp_path / "part", 1, **changes)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"method: passthrough\nmodels: [{tmp_path / 'part'}]\nfill_missing: {tmp_path / 'whole'}\n"
    )
    with pytest.raises(RecipeError, match=match):
        Recipe.read(file).merge()


def test_fill_missing_keeps_the_vocabulary() -> None:
    with pytest.raises(RecipeError, match="fill_missing keeps the vocabulary"):
        Recipe.of({"models": ["a"], "fill_missing": "b", "tokenizer": "union"})
