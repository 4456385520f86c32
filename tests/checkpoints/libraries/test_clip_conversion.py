"""CLIP models converted between open_clip and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.transformers_folders import saved, small_clip
from PIL import Image

from weightops import evaluate, open_checkpoint
from weightops.checkpoints.libraries.clip_conversion import convert
from weightops.checkpoints.libraries.transformers import TransformersArchitecture
from weightops.checkpoints.matching import as_open_clip, convert_to
from weightops.cli.main import run
from weightops.errors import CheckpointError
from weightops.evaluation.image_model import ImageModel


def test_written_for_the_other_library(tmp_path: Path) -> None:
    """The embedded model has the same weights, tokens, inputs and features there and back."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    there, back = tmp_path / "transformers", tmp_path / "open_clip"
    assert run(["merge", "embedded", "--format", "transformers", "-o", str(there)]) == 0
    ours, theirs = ImageModel.open("embedded", "cpu"), CLIPModel.from_pretrained(there).eval()
    prompts = ["a photo of the digit: 7", "Two RED triangles!", "don't"]
    tokens = AutoTokenizer.from_pretrained(there)(
        prompts, padding="max_length", return_tensors="pt"
    )["input_ids"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(there)(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels[0], ours.preprocess(image), atol=1e-5)
    with torch.no_grad():
        text, seen = (
            theirs.get_text_features(input_ids=tokens),
            theirs.get_image_features(pixel_values=pixels),
        )
        text, seen = (getattr(features, "pooler_output", features) for features in (text, seen))
        assert torch.allclose(text, ours.module.encode_text(ours.tokenizer(prompts)), atol=1e-5)
        assert torch.allclose(seen, ours.module.encode_image(pixels), atol=1e-5)
    assert run(["merge", str(there), "--format", "open_clip", "-o", str(back)]) == 0
    start, again = open_checkpoint("embedded"), open_checkpoint(back)
    assert set(start) == set(again)
    assert all(torch.equal(start[name], again[name]) for name in start)
    assert torch.equal(again.tokenizer()(prompts), start.tokenizer()(prompts))
    assert evaluate(there, "counting", split="validation")["counting"]["acc1"] == pytest.approx(
        evaluate("embedded", "counting", split="validation")["counting"]["acc1"], abs=0.005
    )
    assert run(["merge", str(there), "--format", "timm", "-o", str(tmp_path / "x")]) == 1
    assert run(["merge", str(there), "--format", "safetensors", "-o", str(tmp_path / "plain")]) == 0
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "README.md",
        "recipe.yaml",
        "model.safetensors",
    }


def test_what_transformers_lacks(tmp_path: Path) -> None:
    folder = open_checkpoint("embedded").save(tmp_path / "odd")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["no_ln_pre"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"settings that transformers' CLIP lacks: vision_cfg\.no_ln_pre"
    ):
        convert_to(open_checkpoint(folder), "transformers")


def test_an_activation_that_open_clip_lacks(tmp_path: Path) -> None:
    gelu = as_open_clip(open_checkpoint(saved(small_clip(0, hidden_act="gelu"), tmp_path / "gelu")))
    assert gelu.known_architecture().config["model_cfg"]["quick_gelu"] is False
    with pytest.raises(CheckpointError, match="settings that open_clip doesn't have"):
        as_open_clip(open_checkpoint(saved(small_clip(0, hidden_act="relu"), tmp_path / "relu")))


@pytest.mark.parametrize(
    ("name", "settings", "mode"),
    [
        ("preprocessor_config.json", {"size": 32}, "shortest"),
        ("preprocessor_config.json", {"size": None, "image_std": None}, "shortest"),
        (
            "processor_config.json",
            {"image_processor": {"size": {"height": 32, "width": 32}}},
            "squash",
        ),
    ],
)
def test_where_the_preparation_of_images_is_described(
    name: str, settings: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    folder = saved(small_clip(0), tmp_path / "x")
    inner = settings.get("image_processor", settings)
    inner["image_mean"] = [0.1, 0.2, 0.3]
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / name).write_text(json.dumps(settings))
    converted = convert(TransformersArchitecture(folder), "open_clip")
    assert converted is not None
    assert converted.config["preprocess_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert converted.config["preprocess_cfg"]["resize_mode"] == mode
