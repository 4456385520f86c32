"""Settings of transformers' image processors: features as transformers has them, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from weightops import TASKS, ImageModel
from weightops.cli.main import run
from weightops.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip") / "clip"
    assert run(["merge", "embedded", "--format", "transformers", "-o", str(out)]) == 0
    return out


def with_settings(folder: Path, out: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(folder, out)
    path = out / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_normalize": False},
        {"do_normalize": None},
        {"do_rescale": None, "image_mean": [127.5] * 3, "image_std": [60.0] * 3},
        {"image_mean": 0.5, "image_std": [0.25]},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [60.0] * 3},
        {"resample": 2},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": 32, "crop_size": 32, "do_center_crop": True},
    ],
)
def test_features_are_those_of_transformers(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    changed = with_settings(folder, tmp_path / "changed", changes)
    images = TASKS["shapes"].load("test")
    pictures = [images[i].resize((57, 43)) for i in range(8)]
    theirs = CLIPModel.from_pretrained(changed).eval()
    inputs = CLIPImageProcessor.from_pretrained(changed)(pictures, return_tensors="pt")
    ours = ImageModel.open(str(changed), "cpu")
    with torch.no_grad():
        pooled = theirs.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        expected = torch.nn.functional.normalize(theirs.visual_projection(pooled), dim=-1)
        found = ours.encode_image(torch.stack([ours.preprocess(p) for p in pictures]))
    assert float((1 - (expected * found).sum(1)).max()) < 1e-5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": {"shortest_edge": 40}}, "size, crop_size, do_resize or do_center_crop"),
        (
            {"size": {"shortest_edge": 32}, "do_center_crop": False},
            "size, crop_size, do_resize or do_center_crop",
        ),
        ({"do_resize": False}, "size, crop_size, do_resize or do_center_crop"),
        ({"resample": 1}, "image processor's resample"),
        ({"resample": 0}, "image processor's resample"),
        ({"do_pad": True}, "image processor's do_pad"),
        ({"image_mean": [0.5] * 4}, "image processor's image_mean or image_std"),
        ({"image_std": [0.0] * 3}, "image processor's image_mean or image_std"),
        (
            {"image_processor_type": "ViTImageProcessor", "image_mean": None},
            "a ViTImageProcessor, whose own image_mean aren't known",
        ),
    ],
)
def test_settings_that_open_clip_lacks_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    changed = with_settings(folder, tmp_path / "changed", changes)
    with pytest.raises(CheckpointError, match=named):
        ImageModel.open(str(changed), "cpu")
