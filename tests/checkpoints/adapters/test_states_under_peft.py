"""States that are saved while peft wraps a model, which hold weights and their edits apart."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from weightops import merge, open_checkpoint
from weightops.errors import CheckpointError

KINDS = {
    "LoRA": peft.LoraConfig(target_modules=["0"], modules_to_save=["1"]),
    "IA3": peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "VeRA": peft.VeraConfig(target_modules=["0"]),
    "HRA": peft.HRAConfig(target_modules=["0"]),
    "FourierFT": peft.FourierFTConfig(target_modules=["0"], n_frequency=4),
    "MiSS": peft.MissConfig(target_modules=["0"], r=4),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_wraps_is_no_model(kind: str, whole: bool, tmp_path: Path) -> None:
    """A state holds the base's weights and what edits them; an adapter's file lost its settings."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model = peft.get_peft_model(net, KINDS[kind])
    saved = model.state_dict() if whole else peft.get_peft_model_state_dict(model)
    state = {name: tensor.clone() for name, tensor in saved.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    for given in (tmp_path, state):
        with pytest.raises(CheckpointError, match="without its configuration, in names of peft"):
            merge([given, given])


def test_a_layer_that_is_called_base(tmp_path: Path) -> None:
    """DLA, a network of timm, has a layer with the name that peft gives what it wraps."""
    state = {f"model.base_layer.{i}.weight": torch.ones(2) for i in range(3)}
    torch.save({**state, "model.fc.weight": torch.ones(2)}, tmp_path / "dla.pt")
    assert len(open_checkpoint(tmp_path / "dla.pt")) == 4
