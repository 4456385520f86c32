"""Adapters of every kind that peft merges: equal to peft's own merge in float32."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from weightops import TaskVector, merge
from weightops.cli.main import run
from weightops.errors import CheckpointError, SpaceError


class Net(nn.Module):
    """A plain model with every layer that adapters are made on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv2d(16, 4, 3)
        self.head = nn.Linear(4, 2)
        self.config = {"model_type": "custom"}


TWO = ["first", "second"]
KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "DoRA": lambda: peft.LoraConfig(r=3, target_modules=[*TWO, "conv", "embed"], use_dora=True),
    "DoRA with a whole module": lambda: peft.LoraConfig(
        r=3, target_modules=TWO, use_dora=True, modules_to_save=["head"]
    ),
    "DoRA with biases": lambda: peft.LoraConfig(r=3, target_modules=TWO, use_dora=True, bias="all"),
    "biases of LoRA": lambda: peft.LoraConfig(r=3, target_modules=TWO, lora_bias=True),
    "attention": lambda: peft.LoraConfig(r=3, target_modules=["attn", "first"]),
    "PiSSA": lambda: peft.LoraConfig(r=3, target_modules=TWO, init_lora_weights="pissa"),
    "OLoRA": lambda: peft.LoraConfig(r=3, target_modules=TWO, init_lora_weights="olora"),
    "new tokens": lambda: peft.LoraConfig(
        r=3, target_modules=TWO, trainable_token_indices={"embed": [1, 4]}
    ),
    "tokens alone": lambda: peft.TrainableTokensConfig(
        target_modules=["embed"], token_indices=[1, 4]
    ),
    "parameters": lambda: peft.LoraConfig(
        r=2, target_modules=["second"], target_parameters=["first.weight"]
    ),
    "rank-stabilised DoRA with patterns": lambda: peft.LoraConfig(
        r=3,
        target_modules=TWO,
        use_dora=True,
        use_rslora=True,
        rank_pattern={"first": 2},
        alpha_pattern={"^second": 5},
    ),
    "IA3": lambda: peft.IA3Config(target_modules=[*TWO, "conv"], feedforward_modules=["second"]),
    "LoHa": lambda: peft.LoHaConfig(r=3, target_modules=[*TWO, "conv"]),
    "LoKr": lambda: peft.LoKrConfig(r=3, target_modules=[*TWO, "conv"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_modules=TWO, total_step=10),
    "VeRA": lambda: peft.VeraConfig(r=3, target_modules=TWO),
    "VeRA without projections": lambda: peft.VeraConfig(
        r=3, target_modules=TWO, save_projection=False
    ),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TWO),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TWO),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TWO),
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=TWO),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=30, target_modules=TWO),
    "C3A": lambda: peft.C3AConfig(block_size=8, target_modules=TWO),
    "SHiRA": lambda: peft.ShiraConfig(r=2, target_modules=TWO),
    "RandLoRA": lambda: peft.RandLoraConfig(r=2, target_modules=TWO),
    "DeLoRA": lambda: peft.DeloraConfig(r=2, target_modules=TWO),
    "GraLoRA": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=TWO),
    "RoAd": lambda: peft.RoadConfig(group_size=8, variant="road_1", target_modules=TWO),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=30, target_modules=TWO),
    "HiRA": lambda: peft.HiraConfig(r=2, target_modules=TWO),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}


def trained(folder: Path, base: nn.Module, config: peft.PeftConfig) -> dict[str, torch.Tensor]:
    """Save an adapter with random values; return the weights after peft's merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        model: Any = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        merged: dict[str, torch.Tensor] = loaded.merge_and_unload().state_dict()
        return merged


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_merges(base: nn.Module, tmp_path: Path, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = KINDS[kind]()
    wanted = trained(tmp_path / "adapter", base, config)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    got = TaskVector(base, tmp_path / "adapter").apply(base).state_dict()
    assert got.keys() == wanted.keys()
    assert any(not torch.allclose(wanted[n], before[n], atol=1e-4) for n in wanted)
    for name, tensor in wanted.items():
        scale = max(1.0, float(tensor.abs().max()))
        assert float((got[name] - tensor).abs().max()) <= 1e-6 * scale, name
        assert torch.equal(base.state_dict()[name], before[name])
    half = TaskVector(base, tmp_path / "adapter").apply(base, 0.5).state_dict()
    for name, tensor in wanted.items():
        assert torch.allclose(half[name], (tensor + before[name]) / 2, atol=1e-4), name


def test_what_needs_its_base_says_so(base: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    trained(folder, base, KINDS["DoRA"]())
    with pytest.raises(SpaceError, match="computed from the weights that it changes"):
        TaskVector.load(folder)
    with pytest.raises(CheckpointError, match="doesn't say of what model it is"):
        TaskVector(base.state_dict(), folder)


def test_an_adapter_of_another_model_is_refused(base: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    trained(folder, base, KINDS["DoRA"]())
    other = nn.Sequential(nn.Linear(8, 16))
    with pytest.raises(CheckpointError, match=r"peft can't put .* on Sequential"):
        TaskVector(other, folder)


def test_on_a_folder_and_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base in bfloat16 is merged in float32 and rounded once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "base")
    widened = copy.deepcopy(model).float()
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    wanted = trained(tmp_path / "dora", widened, peft.LoraConfig(use_dora=True, **settings))
    made = merge([tmp_path / "dora"], "task_arithmetic", base=tmp_path / "base").state_dict()
    assert all(torch.equal(made[name], wanted[name].bfloat16()) for name in made)
    out = tmp_path / "out"
    line = ["apply", str(tmp_path / "dora"), "--base", str(tmp_path / "base"), "-o", str(out)]
    assert run(line) == 0
    loaded, told = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    assert torch.equal(loaded.state_dict()["lm_head.weight"], wanted["lm_head.weight"].bfloat16())
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "dora")]) == 0
    assert "DoRA" in capsys.readouterr().out
