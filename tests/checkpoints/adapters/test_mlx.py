"""Adapters of mlx-lm, against the formula of its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from weightops import CheckpointError, TaskVector, merge, open_checkpoint
from weightops.cli.main import run
from weightops.support.json_files import write_json

Q, EMBED = "model.layers.1.self_attn.q_proj", "model.embed_tokens"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 16}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(folder: Path, kind: str = "lora", **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Write an adapter of rank 2 of two layers, of which the weights are square."""
    state = {f"{Q}.lora_a": torch.randn(16, 2), f"{Q}.lora_b": torch.randn(2, 16)}
    state |= {f"{EMBED}.lora_a": torch.randn(16, 2), f"{EMBED}.lora_b": torch.randn(2, 16), **more}
    folder.mkdir()
    save_file(state, folder / "adapters.safetensors")
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": kind, "num_layers": 16, "lora_parameters": parameters}
    write_json(folder / "adapter_config.json", config)
    return state


@pytest.mark.parametrize("ref", ["", "adapters.safetensors"])
def test_it_is_what_mlx_computes(ref: str, base: Path, tmp_path: Path) -> None:
    """A linear layer gives ``x W.T + scale (x a) b``, an embedding ``W[i] + scale a[i] b``."""
    state = adapter(tmp_path / "adapter")
    pre, x = load_file(base / "model.safetensors"), torch.randn(3, 16)
    edited = merge([tmp_path / "adapter" / ref], base=base)
    expected = x @ pre[f"{Q}.weight"].T + 20 * (x @ state[f"{Q}.lora_a"]) @ state[f"{Q}.lora_b"]
    assert torch.allclose(x @ edited[f"{Q}.weight"].T, expected, atol=1e-4)
    rows = pre[f"{EMBED}.weight"] + 20 * state[f"{EMBED}.lora_a"] @ state[f"{EMBED}.lora_b"]
    assert torch.allclose(edited[f"{EMBED}.weight"], rows, atol=1e-4)
    changed = {name for name, tensor in pre.items() if not torch.equal(tensor, edited[name])}
    assert changed == {f"{Q}.weight", f"{EMBED}.weight"}
    half = TaskVector(base, tmp_path / "adapter").apply(base, 0.5)
    assert torch.allclose(2 * half[f"{EMBED}.weight"] - pre[f"{EMBED}.weight"], rows, atol=1e-4)


def test_it_becomes_one_of_peft(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    both = [str(tmp_path / "adapter")] * 2
    assert run(["merge", *both, "-o", str(tmp_path / "joined")]) == 0
    once, joined = (merge([tmp_path / f], base=base) for f in ("adapter", "joined"))
    assert TaskVector(once, joined).norm() < 1e-4


@pytest.mark.parametrize("kind", ["dora", "full", "experts", "no rank"])
def test_what_is_no_plain_lora(kind: str, tmp_path: Path) -> None:
    more = {"model.layers.0.mlp.lora_a": torch.ones(3, 2, 4)} if kind == "experts" else {}
    adapter(tmp_path / "adapter", kind if kind in ("dora", "full") else "lora", **more)
    if kind == "no rank":
        write_json(tmp_path / "adapter" / "adapter_config.json", {"lora_parameters": {}})
    with pytest.raises(CheckpointError, match=r"hint: `mlx_lm.fuse` merges it into its model"):
        open_checkpoint(tmp_path / "adapter")
