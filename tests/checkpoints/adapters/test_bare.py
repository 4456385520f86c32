"""Files of LoRA matrices without a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightops import TaskVector, merge, open_checkpoint
from weightops.checkpoints.opening import open_any
from weightops.errors import CheckpointError
from weightops.support.json_files import write_json

HALVES = {
    "peft or diffusers": ("base_model.model.l.lora_A.weight", "base_model.model.l.lora_B.weight"),
    "kohya": ("lora_unet_mid_attn.lora_down.weight", "lora_unet_mid_attn.lora_up.weight"),
    "diffusers": ("unet.mid.to_q.lora.down.weight", "unet.mid.to_q.lora.up.weight"),
    "of diffusers": ("mid.processor.to_q_lora.down.weight", "mid.processor.to_q_lora.up.weight"),
    "LoHa": ("lora_unet_mid.hada_w1_a", "lora_unet_mid.hada_w1_b"),
    "LoKr": ("lora_unet_mid.lokr_w1", "lora_unet_mid.lokr_w2"),
}


@pytest.mark.parametrize("kind", HALVES)
def test_factors_of_edits_are_no_weights(tmp_path: Path, kind: str) -> None:
    tensors = {name: torch.randn(4, 4) for name in HALVES[kind]}
    save_file(tensors, tmp_path / "bare.safetensors")
    torch.save(tensors, tmp_path / "bare.pt")
    for source in (tmp_path / "bare.safetensors", tmp_path / "bare.pt", tensors):
        with pytest.raises(CheckpointError, match=f"in names of {kind.removeprefix('of ')}"):
            open_any(source)
    with pytest.raises(CheckpointError, match="factors of one edit"):
        merge([tmp_path / "bare.safetensors"] * 2)


def test_the_file_of_an_adapter_is_its_folder(tmp_path: Path) -> None:
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    names = HALVES["peft or diffusers"]
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["l"]}
    write_json(tmp_path / "adapter_config.json", config)
    vector = TaskVector.load(tmp_path / "adapter_model.safetensors")
    assert torch.allclose(vector["l.weight"], 2 * b @ a)


def test_names_that_only_look_alike(tmp_path: Path) -> None:
    tensors = {"att.w_lora.0.weight": torch.ones(2), "mlp.down_proj": torch.ones(2)}
    assert set(open_checkpoint(tensors)) == set(tensors)
