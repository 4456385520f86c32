"""Folders of libraries that weightops doesn't know: files keep their names, and all goes along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import merge, open_checkpoint
from weightops.errors import CheckpointError


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("adapter_like.safetensors", "adapter_like.safetensors"),
    ],
)
def test_a_component_keeps_its_file_name_and_config(
    given: str, written: str, tmp_path: Path
) -> None:
    config = {"_class_name": "UNet2DConditionModel", "sample_size": 8}
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save = torch.save if given.endswith(".bin") else save_file
        save({"conv_in.weight": torch.full((4, 4), float(i))}, tmp_path / name / given)
    merged = merge([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out")
    assert {path.name for path in merged.iterdir()} == {"config.json", written}
    assert json.loads((merged / "config.json").read_text()) == config
    assert torch.equal(load_file(merged / written)["conv_in.weight"], torch.full((4, 4), 0.5))
    with pytest.raises(CheckpointError, match="of a library that weightops doesn't know"):
        open_checkpoint(merged).model()


class Mixed(nn.Module, PyTorchModelHubMixin):
    """A model of the Hub's mixin."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)


def test_a_folder_of_the_hubs_mixin_loads_there(tmp_path: Path) -> None:
    for name in "ab":
        Mixed(width=3).save_pretrained(tmp_path / name)
    merged = merge([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out")
    models = [Mixed.from_pretrained(path) for path in (tmp_path / "a", tmp_path / "b", merged)]
    a, b, mean = (model.layer.weight for model in models)
    assert torch.allclose((a + b) / 2, mean)


def test_a_pipeline_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a pipeline of several models: unet"):
        open_checkpoint(tmp_path)
