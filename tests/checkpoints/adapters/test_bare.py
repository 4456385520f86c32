"""Files of factors without a configuration: kohya's, diffusers', LyCORIS'."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.checkpoints.opening import open_any
from weightops.cli.main import run
from weightops.errors import CheckpointError, MismatchError, SpaceError
from weightops.support.json_files import write_json

State = dict[str, torch.Tensor]


class Block(nn.Module):
    """A part of a UNet, in the names of diffusers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict(
            {"to_q": nn.Linear(width, width), "to_out": nn.ModuleList([nn.Linear(width, width)])}
        )
        self.proj_in = nn.Conv2d(width, 12, 1)
        self.conv = nn.Conv2d(width, 12, 3)
        self.norm = nn.LayerNorm(width)


def unet_state(seed: int = 0) -> State:
    """Return the weights of a small model in the names of diffusers' UNets."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"mid_block": nn.ModuleList([Block(), Block()])})
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def component(folder: Path, state: State) -> Path:
    """Write a folder of a pipeline of diffusers."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"_class_name": "UNet2DConditionModel"})
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


def pair(weight: torch.Tensor, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return down and up of a LoRA for a weight."""
    ones = [1] * (weight.dim() - 2)
    return torch.randn(rank, *weight.shape[1:]), torch.randn(len(weight), rank, *ones)


def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return ``up @ down``, computed place by place of the kernel."""
    return torch.einsum("or...,ri...->oi...", up, down)


EDITED = ("mid_block.0.attn1.to_q", "mid_block.1.attn1.to_out.0", "mid_block.1.proj_in")
CONV = "mid_block.0.conv"


def kohya(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


@pytest.mark.parametrize("in_file", [True, False])
def test_kohya(tmp_path: Path, in_file: bool) -> None:
    """Linear layers and convolutions of any kernel, each with its alpha and rank."""
    base, factors, wanted = unet_state(), {}, unet_state()
    for rank, module in enumerate((*EDITED, CONV), 2):
        down, up = pair(base[f"{module}.weight"], rank)
        factors[f"{kohya(module)}.lora_down.weight"] = down
        factors[f"{kohya(module)}.lora_up.weight"] = up
        factors[f"{kohya(module)}.alpha"] = torch.tensor(1.5)
        wanted[f"{module}.weight"] += 1.5 / rank * product(up, down)
    given: Any = factors
    if in_file:
        save_file(factors, tmp_path / "lora.safetensors")
        given = str(tmp_path / "lora.safetensors")
    got = TaskVector(base, given).apply(base)
    for name, tensor in wanted.items():
        assert torch.allclose(got[name], tensor, atol=1e-6), name
    half = merge([given], "task_arithmetic", base=base, alpha=0.5)
    for name, tensor in wanted.items():
        assert torch.allclose(half[name], (tensor + base[name]) / 2, atol=1e-6), name


STYLES = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "linear layers": (
        "unet.{}.lora_linear_layer.down.weight",
        "unet.{}.lora_linear_layer.up.weight",
    ),
    "without a part": ("{}.lora.down.weight", "{}.lora.up.weight"),
}


@pytest.mark.parametrize("style", STYLES)
def test_diffusers(style: str) -> None:
    """Without an alpha, the product isn't scaled, whatever the ranks."""
    base, factors, wanted = unet_state(), {}, unet_state()
    for rank, module in enumerate((*EDITED, CONV), 2):
        down, up = pair(base[f"{module}.weight"], rank)
        names = (pattern.format(module) for pattern in STYLES[style])
        factors |= dict(zip(names, (down, up), strict=True))
        wanted[f"{module}.weight"] += product(up, down)
    got = TaskVector(base, factors).apply(base)
    assert all(torch.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)


def test_layers_of_attention_processors() -> None:
    base, wanted = unet_state(), unet_state()
    down, up = pair(base["mid_block.0.attn1.to_q.weight"])
    begin = "mid_block.0.attn1.processor"
    factors = {
        f"{begin}.to_q_lora.down.weight": down,
        f"{begin}.to_q_lora.up.weight": up,
        f"{begin}.to_out_lora.down.weight": 2 * down,
        f"{begin}.to_out_lora.up.weight": up,
    }
    wanted["mid_block.0.attn1.to_q.weight"] += up @ down
    wanted["mid_block.0.attn1.to_out.0.weight"] += 2 * up @ down
    got = TaskVector(base, factors).apply(base)
    assert all(torch.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)


def test_settings_in_the_metadata(tmp_path: Path) -> None:
    """diffusers notes peft's settings of each part in the file."""
    base, wanted = unet_state(), unet_state()
    ranks = dict(zip(EDITED, (2, 2, 4), strict=True))
    factors = {}
    for module, rank in ranks.items():
        down, up = pair(base[f"{module}.weight"], rank)
        factors |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        wanted[f"{module}.weight"] += 7 / rank**0.5 * product(up, down)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 7, "use_rslora": True}
    settings["rank_pattern"] = {"proj_in": 4}
    noted = json.dumps({f"unet.{name}": value for name, value in settings.items()})
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(factors, file, {"format": "pt", "lora_adapter_metadata": noted})
    got = TaskVector(base, str(tmp_path)).apply(base)
    assert all(torch.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)
    noted = json.dumps({f"unet.{n}": v for n, v in {**settings, "lora_bias": True}.items()})
    save_file(factors, file, {"lora_adapter_metadata": noted})
    with pytest.raises(CheckpointError, match="more than a plain LoRA"):
        TaskVector(base, str(tmp_path))


def lycoris() -> dict[str, tuple[str, State, torch.Tensor]]:
    """Return kind -> module, factors, and the delta by another formula."""
    torch.manual_seed(1)
    linear, conv = EDITED[0], CONV
    r = torch.randn
    core, a, b = r(2, 2, 3, 3), r(2, 12), r(2, 8)
    tucker = torch.zeros(12, 8, 3, 3)
    for i in range(2):
        for j in range(2):
            tucker += core[i, j] * torch.outer(a[i], b[j])[:, :, None, None]
    w1a, w1b, w2a, w2b = r(8, 2), r(2, 8), r(8, 2), r(2, 8)
    hada = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
    left, right, kernel = r(2, 4), r(4, 2), r(6, 2, 3, 3)
    kron = torch.stack([torch.stack([x * right for x in row]) for row in left])  # (2, 4, 4, 2)
    by_kernel = torch.einsum("ab,cdkl->acbdkl", left, kernel)
    alpha = torch.tensor(3.0)
    return {
        "Tucker": (
            conv,
            {
                "lora_mid.weight": core,
                "lora_up.weight": a.T[:, :, None, None],
                "lora_down.weight": b[:, :, None, None],
                "alpha": alpha,
            },
            1.5 * tucker,
        ),
        "LoHa": (linear, {**hada, "alpha": alpha}, 1.5 * (w1a @ w1b) * (w2a @ w2b)),
        "LoHa of a core": (
            conv,
            {
                "hada_t1": core,
                "hada_w1_a": a,
                "hada_w1_b": b,
                "hada_t2": core,
                "hada_w2_a": a,
                "hada_w2_b": b,
            },
            tucker**2,
        ),
        "LoKr": (
            linear,
            {"lokr_w1": left, "lokr_w2": right, "alpha": alpha},
            kron.permute(0, 2, 1, 3).reshape(8, 8),
        ),
        "LoKr of a kernel": (
            conv,
            {"lokr_w1": left, "lokr_w2": kernel},
            by_kernel.reshape(12, 8, 3, 3),
        ),
        "LoKr of factors": (
            linear,
            {"lokr_w1": left, "lokr_w2_a": right, "lokr_w2_b": torch.eye(2), "alpha": alpha},
            1.5 * kron.permute(0, 2, 1, 3).reshape(8, 8),
        ),
        "difference": (linear, {"diff": w1a @ w1b}, w1a @ w1b),
    }


@pytest.mark.parametrize("kind", lycoris())
def test_lycoris(kind: str) -> None:
    module, factors, delta = lycoris()[kind]
    base = unet_state()
    named = {f"{kohya(module)}.{name}": tensor for name, tensor in factors.items()}
    got = TaskVector(base, named).apply(base)
    for name, tensor in base.items():
        expected = tensor + delta if name == f"{module}.weight" else tensor
        assert torch.allclose(got[name], expected, atol=1e-5), name


def test_differences_of_biases_and_norms() -> None:
    base = unet_state()
    change = torch.randn(8)
    begin = "lora_unet_mid_block_0_norm"
    got = TaskVector(base, {f"{begin}.w_norm": change, f"{begin}.b_norm": 2 * change}).apply(base)
    for end, factor in (("weight", 1), ("bias", 2)):
        name = f"mid_block.0.norm.{end}"
        assert torch.allclose(got[name], base[name] + factor * change)


@pytest.mark.parametrize("norms", ["rows", "columns", "peft"])
@pytest.mark.parametrize("module", [EDITED[0], CONV])
def test_dora(module: str, norms: str) -> None:
    base = unet_state()
    weight = base[f"{module}.weight"]
    down, up = pair(weight)
    edited = weight + product(up, down)
    axis = 1 if norms == "columns" else 0
    others = [i for i in range(weight.dim()) if i != axis]
    sizes = edited.square().sum(others, keepdim=True).sqrt()
    magnitude = torch.rand_like(sizes)
    factors = {
        f"{kohya(module)}.lora_down.weight": down,
        f"{kohya(module)}.lora_up.weight": up,
        f"{kohya(module)}.dora_scale": magnitude,
    }
    if norms == "peft":
        factors = {
            f"unet.{module}.lora_A.weight": down,
            f"unet.{module}.lora_B.weight": up,
            f"unet.{module}.lora_magnitude_vector": magnitude.flatten(),
        }
    got = TaskVector(base, factors).apply(base)
    assert torch.allclose(got[f"{module}.weight"], edited / sizes * magnitude, atol=1e-6)


def two_parts(rank: int = 2) -> State:
    """Return the edits of a UNet and of a text encoder, both of modules of 8 x 8."""
    made = {}
    for begin in ("lora_unet_mid_block_0_attn1_to_q", "lora_te_text_model_layers_0_fc1"):
        down, up = torch.randn(rank, 8), torch.randn(8, rank)
        made |= {f"{begin}.lora_down.weight": down, f"{begin}.lora_up.weight": up}
    return made


def test_each_model_of_a_pipeline_gets_its_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(two_parts(), tmp_path / "lora.safetensors")
    unet = component(tmp_path / "sd" / "unet", unet_state())
    with caplog.at_level(logging.WARNING):
        line = ["apply", str(tmp_path / "lora.safetensors"), "--base", str(unet)]
        assert run([*line, "-o", str(tmp_path / "out")]) == 0
    assert "the edits of text_encoder (1) are left out" in caplog.text
    got, base = open_checkpoint(tmp_path / "out"), unet_state()
    changed = {name for name in base if not torch.equal(got[name], base[name])}
    assert changed == {"mid_block.0.attn1.to_q.weight"}
    # A text encoder of transformers 5 has no "text_model." in its names.
    for name in ("text_model.layers.0.fc1.weight", "layers.0.fc1.weight"):
        vector = TaskVector({name: torch.ones(8, 8)}, str(tmp_path / "lora.safetensors"))
        assert vector.norm() > 0
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_state().items()}
    with pytest.raises(MismatchError, match="text_model_layers_0_fc1"):
        TaskVector(whole, str(tmp_path / "lora.safetensors"))
    whole["cond_stage_model.text_model.layers.0.fc1.weight"] = torch.ones(8, 8)
    assert sum(map(bool, TaskVector(whole, two_parts()).norm(per_tensor=True).values())) == 2


def test_the_second_text_encoder_is_another_model(tmp_path: Path) -> None:
    factors = {}
    for number in (1, 2):
        begin = f"lora_te{number}_text_model_layers_0_fc1"
        factors[f"{begin}.lora_down.weight"] = torch.ones(1, 8)
        factors[f"{begin}.lora_up.weight"] = number * torch.ones(8, 1)
    state = {"text_model.layers.0.fc1.weight": torch.zeros(8, 8)}
    for name, value in (("text_encoder", 1), ("text_encoder_2", 2)):
        folder = component(tmp_path / name, state)
        delta = TaskVector(str(folder), factors)["text_model.layers.0.fc1.weight"]
        assert torch.equal(delta, torch.full((8, 8), float(value)))
    with pytest.raises(MismatchError, match="several models"):
        TaskVector(state, factors)
    second = {name: tensor for name, tensor in factors.items() if "te2" in name}
    with pytest.raises(MismatchError, match="doesn't have"):
        TaskVector(str(tmp_path / "text_encoder"), second)


def test_names_of_stable_diffusion_on_a_folder_of_diffusers() -> None:
    base = {
        "down_blocks.0.resnets.0.conv1.weight": torch.zeros(8, 8, 3, 3),
        "down_blocks.0.resnets.1.conv1.weight": torch.zeros(8, 8, 3, 3),
        "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q.weight": torch.zeros(8, 8),
        "up_blocks.0.upsamplers.0.conv.weight": torch.zeros(8, 8, 3, 3),
        "mid_block.resnets.1.time_emb_proj.weight": torch.zeros(8, 8),
    }
    begins = {
        "input_blocks_2_0_in_layers_2": 1,
        "input_blocks_5_1_transformer_blocks_0_attn1_to_q": 2,
        "output_blocks_2_2_conv": 3,
        "middle_block_2_emb_layers_1": 4,
    }
    factors = {}
    for begin, name in zip(begins, list(base)[1:], strict=True):
        down, up = pair(base[name], 1)
        factors[f"lora_unet_{begin}.lora_down.weight"] = down
        factors[f"lora_unet_{begin}.lora_up.weight"] = up
    norms = TaskVector(base, factors).norm(per_tensor=True)
    assert [bool(value) for value in norms.values()] == [False, True, True, True, True]


REFUSED = {
    "no alpha": ("lora_A.weight", "lora_B.weight", "no alpha by which"),
    "half": ("lora_down.weight", "alpha", "make no edit"),
    "OFT": ("oft_blocks", "alpha", "oft_blocks, which weightops can't apply"),
    "IA3": ("weight", "on_input", "which weightops can't apply"),
    "GLoRA": ("a1.weight", "a2.weight", "which weightops can't apply"),
    "XLabs": ("qkv_lora1.down.weight", "qkv_lora1.up.weight", "qkv_lora1.down.weight, which"),
    "unknown": ("lora_down.weight", "lora_side.weight", "lora_side.weight, which"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(kind: str) -> None:
    first, second, message = REFUSED[kind]
    begin = "mid_block.0.attn1.to_q" if kind == "no alpha" else kohya(EDITED[0])
    with pytest.raises(CheckpointError, match=message):
        open_any({f"{begin}.{first}": torch.ones(8, 8), f"{begin}.{second}": torch.ones(8, 8)})


HALVES = {
    "peft or diffusers": ("base_model.model.l.lora_A.weight", "base_model.model.l.lora_B.weight"),
    "MLX or torchtune": ("model.l.lora_a", "model.l.lora_b"),
}


@pytest.mark.parametrize("kind", HALVES)
def test_factors_whose_scale_is_elsewhere(tmp_path: Path, kind: str) -> None:
    tensors = {name: torch.randn(4, 4) for name in HALVES[kind]}
    save_file(tensors, tmp_path / "bare.safetensors")
    torch.save(tensors, tmp_path / "bare.pt")
    for source in (tmp_path / "bare.safetensors", tmp_path / "bare.pt", tensors):
        with pytest.raises(CheckpointError, match=f"in names of {kind}"):
            open_any(source)
    with pytest.raises(CheckpointError, match="factors of one edit"):
        merge([tmp_path / "bare.safetensors"] * 2)


def test_bad_values_and_other_bases() -> None:
    base = unet_state()
    begin = kohya(EDITED[0])
    factors = {
        f"{begin}.lora_down.weight": torch.ones(2, 8),
        f"{begin}.lora_up.weight": torch.ones(8, 2),
    }
    for alpha in (torch.tensor(float("nan")), torch.tensor(0.0), torch.ones(2)):
        with pytest.raises(CheckpointError, match="is no alpha"):
            TaskVector(base, {**factors, f"{begin}.alpha": alpha})
    with pytest.raises(MismatchError, match="mid_block_0_attn1_to_q"):
        TaskVector({"mid_block.0.attn1.to_k.weight": torch.ones(8, 8)}, factors)
    with pytest.raises(MismatchError, match="other shapes"):
        TaskVector({"mid_block.0.attn1.to_q.weight": torch.ones(8, 9)}, factors)
    twice = {
        "a.mid_block.0.attn1.to_q.weight": torch.ones(8, 8),
        "b.mid_block.0.attn1.to_q.weight": torch.ones(8, 8),
    }
    with pytest.raises(MismatchError, match="several parts"):
        TaskVector(twice, factors)
    with pytest.raises(SpaceError, match="no plain LoRA"):
        merge([factors, factors])
    with pytest.raises(MismatchError, match="says no alpha"):
        TaskVector(
            {"transformer.h.0.fc.weight": torch.ones(8, 8)},
            {
                "transformer.h.0.fc.lora_A.weight": torch.ones(2, 8),
                "transformer.h.0.fc.lora_B.weight": torch.ones(8, 2),
            },
        )


def test_the_file_of_an_adapter_is_its_folder(tmp_path: Path) -> None:
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    names = HALVES["peft or diffusers"]
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["l"]}
    write_json(tmp_path / "adapter_config.json", config)
    vector = TaskVector.load(tmp_path / "adapter_model.safetensors")
    assert torch.allclose(vector["l.weight"], 2 * b @ a)


def test_names_that_only_look_alike() -> None:
    tensors = {"att.w_lora.0.weight": torch.ones(2), "mlp.down_proj": torch.ones(2)}
    assert set(open_checkpoint(tensors)) == set(tensors)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(two_parts(3), tmp_path / "lora.safetensors")
    assert run(["inspect", str(tmp_path / "lora.safetensors")]) == 0
    assert "LoRA of rank 3 on 2 modules" in capsys.readouterr().out


def test_as_diffusers_fuses_it(tmp_path: Path) -> None:
    """A LoRA of kohya on a UNet of diffusers equals diffusers' own fusion."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    unet.save_pretrained(tmp_path / "unet")
    factors, alphas = {}, {}
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.endswith(("to_q", "conv1")):
            down, up = pair(module.weight)
            factors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            alphas[f"unet.{name}.alpha"] = 2.0
    fused = copy.deepcopy(unet)
    fused.load_lora_adapter(dict(factors), network_alphas=dict(alphas), prefix="unet")
    fused.fuse_lora()
    fused.unload_lora()
    given = {**factors, **{name: torch.tensor(alpha) for name, alpha in alphas.items()}}
    got = TaskVector(str(tmp_path / "unet"), given).apply(str(tmp_path / "unet"))
    for name, tensor in fused.state_dict().items():
        assert torch.allclose(got[name], tensor, atol=1e-6), name
