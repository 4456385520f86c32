"""Adapters written from task vectors: the error that is told is the error of what peft loads."""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from weightops import TaskVector
from weightops.cli.main import run

TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {**TEXT, "image_size": 8, "patch_size": 4}
GPT2: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 40}
GPT2 |= {"n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
T5: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
T5 |= {"num_heads": 2, "decoder_start_token_id": 0}
MOE = {"num_local_experts": 3, "num_key_value_heads": 1}
TWO_EACH = {"head_dim": 8, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 12,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
TIED = {**TEXT, "tie_word_embeddings": True}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "tied Llama": ("LlamaForCausalLM", "LlamaConfig", TIED),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "GPT-2 without head": ("GPT2Model", "GPT2Config", GPT2),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "ALBERT": ("AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 8}),
    "BERT": ("BertForMaskedLM", "BertConfig", TEXT),
    "ViT": ("ViTForImageClassification", "ViTConfig", VISION),
    "CLIP": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, **MOE}),
    "DeepSeek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**TEXT, **DEEPSEEK}),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", {**TEXT, **MOE, **TWO_EACH}),
    "Llama 4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**TEXT, **MOE, **TWO_EACH, "intermediate_size_mlp": 24},
    ),
    "ResNet": ("ResNetForImageClassification", "ResNetConfig", {**RESNET, "layer_type": "basic"}),
}


def pair(folder: Path, name: str, rank: int) -> tuple[Any, Any]:
    """Save a model and a fine-tuned one, whose matrices differ by products of a rank."""
    kind, config, sizes = MODELS[name]
    torch.manual_seed(0)
    base = getattr(hf, kind)(getattr(hf, config)(**sizes)).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.ndim > 1 and len(parameter) > 1:
                experts = parameter if parameter.ndim == 3 else parameter.flatten(1)[None]
                left, right = (torch.randn(len(experts), n, rank) for n in experts.shape[1:])
                parameter.add_(0.1 * (left @ right.mT).reshape(parameter.shape))
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return base, tuned


def by_peft(base: nn.Module, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return what peft makes of a base and an adapter, and the weights after its merge.

    Warnings of adapter keys without a module are errors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*adapter keys.*")
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        merged = copy.deepcopy(loaded).merge_and_unload()
        return loaded, merged.state_dict()


def error_of(got: dict[str, torch.Tensor], base: nn.Module, tuned: nn.Module) -> float:
    """Return the norm of what an edit lacks over that of the change of a model's parameters."""
    lost = total = 0.0
    before, after = base.state_dict(), tuned.state_dict()
    for name, _ in tuned.named_parameters():
        wanted = after[name]
        lost += float((got[name] - wanted).square().sum())
        total += float((wanted - before[name]).square().sum())
    return math.sqrt(lost / total)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", [2, 1])
def test_the_error_is_that_of_what_peft_loads(tmp_path: Path, name: str, rank: int) -> None:
    version = tuple(map(int, hf.__version__.split(".")[:2]))
    if name == "DeepSeek" and version < (5, 16):
        pytest.skip("its experts read a bias of the router, which peft hides there")
    base, tuned = pair(tmp_path, name, 2)
    for i, (pre, ft) in enumerate([(tmp_path / "base", tmp_path / "tuned"), (base, tuned)]):
        out = tmp_path / f"adapter{i}"
        told = TaskVector(pre, ft).save_lora(out, rank)["relative_error"]
        loaded, merged = by_peft(base, out)
        assert error_of(merged, base, tuned) == pytest.approx(told, rel=1e-3, abs=1e-5)
        if rank == 2:
            assert told < 1e-5
        inputs = given(base)
        with torch.no_grad():
            fused = copy.deepcopy(base)
            fused.load_state_dict(merged, strict=False)
            assert torch.allclose(loaded(**inputs)[0], fused(**inputs)[0], atol=1e-4)
        again = TaskVector(pre, out)
        assert error_of(edited(base, again, pre), base, tuned) == pytest.approx(
            told, rel=1e-3, abs=1e-5
        )


def edited(base: Any, vector: TaskVector, pre: Any) -> dict[str, torch.Tensor]:
    """Return the weights that a vector gives, under the names of the module."""
    if isinstance(pre, nn.Module):
        weights: dict[str, torch.Tensor] = vector.apply(pre).state_dict()
        return weights
    out = vector.apply(pre).save(pre.parent / "edited", overwrite=True)
    loaded: dict[str, torch.Tensor] = type(base).from_pretrained(out).state_dict()
    return loaded


def given(model: Any) -> dict[str, torch.Tensor]:
    """Return inputs of a model."""
    if model.main_input_name == "pixel_values":
        torch.manual_seed(1)
        return {"pixel_values": torch.randn(1, 3, 8, 8)}
    ids = {"input_ids": torch.arange(1, 6)[None]}
    is_t5 = model.config.model_type == "t5"
    return {**ids, "decoder_input_ids": ids["input_ids"]} if is_t5 else ids


def test_packed_experts_alone(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "Mixtral", 2)
    vector = TaskVector(base, tuned).select("*.experts.*")
    assert vector.save_lora(tmp_path / "adapter", 2)["relative_error"] < 1e-5
    _, merged = by_peft(base, tmp_path / "adapter")
    for name, tensor in tuned.state_dict().items():
        expected = tensor if ".experts." in name else base.state_dict()[name]
        assert torch.allclose(merged[name], expected, atol=1e-5), name


def test_what_is_left_out_is_said_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """peft can't merge a LoRA of a grouped convolution, and has none of norms."""
    torch.manual_seed(0)
    base: Any = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(4, 6, 3), nn.Conv3d(4, 6, 2), nn.LayerNorm(6)
    )
    base.config = {"model_type": "custom"}
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    with caplog.at_level(logging.WARNING):
        told = TaskVector(base, tuned).save_lora(tmp_path / "adapter", 6)
    assert "left out, as peft has no LoRA for them: 0.weight" in caplog.text
    assert told["left_out"] == 6
    _, merged = by_peft(base, tmp_path / "adapter")
    assert error_of(merged, base, tuned) == pytest.approx(told["relative_error"], rel=1e-3)
    assert torch.allclose(merged["1.weight"], tuned.state_dict()["1.weight"], atol=1e-5)
    assert torch.allclose(merged["2.weight"], tuned.state_dict()["2.weight"], atol=1e-5)


def test_only_tied_embeddings_changed(tmp_path: Path) -> None:
    base, _ = pair(tmp_path, "tied Llama", 1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.embed_tokens.weight.add_(0.1 * torch.randn(40, 16))
    told = TaskVector(base, tuned).save_lora(tmp_path / "adapter", 1)
    assert told == {"relative_error": 0.0, "left_out": 0}
    loaded, merged = by_peft(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**given(base)).logits, tuned(**given(base)).logits)
    assert torch.equal(merged["lm_head.weight"], tuned.lm_head.weight)


def test_an_attention_of_torch_is_left_out(tmp_path: Path) -> None:
    """A LoRA on its projection has no effect in the forward pass."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "fc": nn.Linear(16, 16)})
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned["attn"].out_proj.weight.add_(1)
        tuned["fc"].weight.add_(1)
    told = TaskVector(base, tuned).save_lora(tmp_path / "adapter", 1)
    assert told["left_out"] == 1
    assert told["relative_error"] == pytest.approx(math.sqrt(0.5))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["fc"]


def test_weights_of_a_model_that_is_not_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrappers' prefixes go, biases show transposed weights, and the guess is told."""
    torch.manual_seed(0)
    shapes = {
        "embed_tokens.weight": (20, 8),
        "fc.weight": (8, 24),
        "fc.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
        "_orig_mod.out.weight": (6, 8),
    }
    base = {f"module.{name}": torch.randn(shape) for name, shape in shapes.items()}
    tuned = {
        n: t + (torch.randn(len(t), 1) @ torch.randn(1, t.shape[1]) if t.ndim == 2 else 0)
        for n, t in base.items()
    }
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    line = ["vector", *(str(tmp_path / f"{n}.safetensors") for n in ("base", "tuned"))]
    with caplog.at_level(logging.WARNING):
        assert run([*line, "--lora", "1", "-o", str(tmp_path / "adapter")]) == 0
    assert "module.embed_tokens.weight are taken for embeddings" in caplog.text
    net: Any = nn.Module()
    net.embed_tokens, net.out = nn.Embedding(20, 8), nn.Linear(8, 6, bias=False)
    net.fc = hf.pytorch_utils.Conv1D(24, 8)
    net.proj = hf.pytorch_utils.Conv1D(8, 8)
    net.config = {"model_type": "custom"}
    bare = {n.removeprefix("module.").removeprefix("_orig_mod."): t for n, t in base.items()}
    net.load_state_dict(bare)
    _, merged = by_peft(net, tmp_path / "adapter")
    for name, tensor in tuned.items():
        own = name.removeprefix("module.").removeprefix("_orig_mod.")
        assert torch.allclose(merged[own], tensor, atol=1e-5), name
