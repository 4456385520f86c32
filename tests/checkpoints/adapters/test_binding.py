"""Adapters on folders of transformers: the edited folder computes what peft's model computes."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.errors import MismatchError, MissingExtraError

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
GPT2: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "vocab_size": 20,
    "n_positions": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TIED = {**TEXT, "tie_word_embeddings": True}


def quietly(function: Any, *arguments: Any, **named: Any) -> Any:
    """Call a function of a library without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **named)


def saved(folder: Path, model: Any, **how: Any) -> Any:
    """Save a model and read it again, as a user of a folder has it."""
    model.save_pretrained(folder, **how)
    return type(model).from_pretrained(folder).eval()


def adapted(folder: Path, model: nn.Module, **settings: Any) -> Any:
    """Return a model with a random LoRA, saved to a folder."""
    config = quietly(peft.LoraConfig, **{"r": 2, "lora_alpha": 3, **settings})
    made = quietly(peft.get_peft_model, copy.deepcopy(model), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    quietly(made.save_pretrained, folder)
    return made


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return inputs of a model."""
    torch.manual_seed(9)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(1, 3, 8, 8)}
    return {"input_ids": torch.arange(5)[None]}


def result(model: Any) -> torch.Tensor:
    """Return the first tensor that a model computes."""
    with torch.no_grad():
        first: torch.Tensor = model(**inputs(model))[0]
        return first


def experts(**more: Any) -> dict[str, Any]:
    """Return settings of an adapter on packed experts."""
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return {"target_modules": ["q_proj"], "target_parameters": both, **more}


HEADS = {"head_dim": 8, "num_key_value_heads": 1, "num_experts_per_tok": 2}
QWEN = {"num_experts": 3, "moe_intermediate_size": 8, **HEADS}
GPT_OSS = {"num_local_experts": 3, **HEADS}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, {"target_modules": "all-linear"}),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        VISION,
        {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
    ),
    "GPT-NeoX": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        TEXT,
        {"target_modules": ["query_key_value", "lm_head"]},
    ),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2, {"target_modules": ["c_attn", "c_proj"]}),
    "DoRA of GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        {"target_modules": ["c_attn", "attn.c_proj"], "use_dora": True},
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**TEXT, "num_local_experts": 3, "num_key_value_heads": 1},
        experts(),
    ),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**TEXT, **QWEN}, experts()),
    "one parameter of Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**TEXT, **QWEN},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", {**TEXT, **GPT_OSS}, experts()),
    "DoRA of ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        VISION,
        {"target_modules": ["q_proj", "fc1"], "use_dora": True},
    ),
    "BERT": ("BertModel", "BertConfig", TEXT, {"target_modules": ["query", "word_embeddings"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_edited_folder_computes_what_peft_computes(tmp_path: Path, name: str) -> None:
    kind, config, sizes, settings = MODELS[name]
    torch.manual_seed(0)
    base = saved(tmp_path / "base", getattr(hf, kind)(getattr(hf, config)(**sizes)))
    model = adapted(tmp_path / "adapter", base, **settings)
    wanted = result(model)
    assert float((wanted - result(base)).abs().max()) > 1e-3
    out = merge([tmp_path / "adapter"], "task_arithmetic", base=tmp_path / "base").save(
        tmp_path / "out"
    )
    loaded, told = type(base).from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    assert torch.allclose(result(loaded.eval()), wanted, atol=1e-5)
    assert load_file(out / "model.safetensors").keys() == open_checkpoint(tmp_path / "base").keys()
    edited = TaskVector(base, tmp_path / "adapter").apply(base)
    assert torch.allclose(result(edited), wanted, atol=1e-5)


def llava() -> Any:
    """Return a tiny model of images and text, whose file has other names than its memory."""
    vision = hf.CLIPVisionConfig(**VISION)
    text = hf.LlamaConfig(**TEXT)
    config = hf.LlavaConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=63
    )
    return hf.LlavaForConditionalGeneration(config)


def test_a_model_of_images_and_text(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", llava())
    model = adapted(tmp_path / "adapter", base, target_modules=["q_proj"])
    out = merge([tmp_path / "adapter"], "task_arithmetic", base=tmp_path / "base").save(
        tmp_path / "out"
    )
    wanted = model.merge_and_unload().state_dict()
    got = type(base).from_pretrained(out).state_dict()
    assert all(torch.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)


TIES: dict[str, tuple[dict[str, Any], bool]] = {
    "a whole embedding": ({"modules_to_save": ["embed_tokens"]}, False),
    "a whole head": ({"modules_to_save": ["lm_head"]}, False),
    "both ends": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both ends as one": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "a pair of the head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "a pair of the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "one pair of both": (
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "DoRA of the head": ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, False),
    "tokens": ({"trainable_token_indices": [1, 3]}, True),
    "no end": ({}, True),
}


@pytest.mark.parametrize("kind", TIES)
def test_ends_that_the_base_ties(tmp_path: Path, kind: str) -> None:
    """The written model computes what the trained one does, and says whether it is tied."""
    settings, tied = TIES[kind]
    torch.manual_seed(0)
    base = saved(tmp_path / "base", hf.LlamaForCausalLM(hf.LlamaConfig(**TIED)))
    model = adapted(tmp_path / "adapter", base, **{"target_modules": ["q_proj"], **settings})
    wanted = result(model)
    merged = merge([tmp_path / "adapter"], "task_arithmetic", base=tmp_path / "base")
    vector = TaskVector(tmp_path / "base", tmp_path / "adapter")
    for made in (merged, vector.apply(tmp_path / "base")):
        out = made.save(tmp_path / "out", overwrite=True)
        loaded, told = type(base).from_pretrained(out, output_loading_info=True)
        assert not any(told.values()), told
        assert torch.allclose(result(loaded.eval()), wanted, atol=1e-5)
        assert torch.allclose(result(made.model()), wanted, atol=1e-5)
        written = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
        one = loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert (written, one) == (tied, tied)
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (not tied)
    half = vector.apply(tmp_path / "base", 0.0).save(tmp_path / "none")
    assert torch.allclose(result(type(base).from_pretrained(half).eval()), result(base), atol=1e-6)


def test_a_tied_module_is_not_untied_in_silence(tmp_path: Path) -> None:
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**TIED))
    adapted(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(MismatchError, match="are one tensor in the target and two in"):
        TaskVector(base, tmp_path / "adapter").apply(base)


def towers() -> dict[str, tuple[Any, str]]:
    """Return whole models, and the name of the part that adapters are made on."""
    text = {**TEXT, "intermediate_size": 24, "max_position_embeddings": 8, "pad_token_id": 0}
    text |= {"bos_token_id": 0, "eos_token_id": 0}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20}
    siglip = hf.SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=VISION)
    bart = hf.BartConfig(vocab_size=40, **layers, **heads, **widths)
    clip = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return {
        "SigLIP": (hf.SiglipModel(siglip), "vision_model"),
        "text of SigLIP": (hf.SiglipModel(siglip), "text_model"),
        "CLIP": (hf.CLIPModel(clip), "vision_model"),
        "BART": (hf.BartModel(bart), "encoder"),
    }


@pytest.mark.parametrize("name", ["SigLIP", "text of SigLIP", "CLIP", "BART"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_a_part_changes_that_part(tmp_path: Path, name: str, dora: bool) -> None:
    """Two parts have layers of one name and shape; the class that an adapter states decides."""
    whole, part = towers()[name]
    whole.save_pretrained(tmp_path / "base")
    tower = whole.get_submodule(part)
    model = adapted(tmp_path / "adapter", tower, target_modules=["q_proj"], use_dora=dora)
    merged = model.merge_and_unload().state_dict()
    for base in (tmp_path / "base", whole):
        vector = TaskVector(base, tmp_path / "adapter")
        changed = {name for name, norm in vector.norm(per_tensor=True).items() if norm}
        assert changed == {n for n in vector if n.startswith(part) and "q_proj.weight" in n}
        for n in changed:
            own = n.removeprefix(f"{part}.")
            before = tower.state_dict()[own]
            assert torch.allclose(before + vector[n], merged[own], atol=1e-6)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["auto_mapping"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    if not dora:
        with pytest.raises(MismatchError, match="fits several parts of") as told:
            TaskVector(whole, tmp_path / "adapter")
        assert part in str(told.value)
        with pytest.raises(MismatchError, match="fits several parts of"):
            TaskVector(whole.state_dict(), tmp_path / "adapter")


@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["c_attn", "lm_head"]])
def test_layers_that_keep_their_weights_transposed_and_others(
    tmp_path: Path, targets: list[str]
) -> None:
    """What peft saves of fan_in_fan_out holds for the last module only."""
    torch.manual_seed(0)
    config = hf.GPT2Config(**GPT2, tie_word_embeddings=False)
    base = saved(tmp_path / "base", hf.GPT2LMHeadModel(config))
    model = adapted(tmp_path / "adapter", base, target_modules=targets)
    wanted = quietly(model.merge_and_unload).state_dict()
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stated["fan_in_fan_out"] is False
    tensors = base.state_dict()
    for start in (tmp_path / "base", base, tensors):
        got = TaskVector(start, tmp_path / "adapter").apply(open_checkpoint(start))
        assert all(torch.allclose(got[n], wanted[n], atol=1e-6) for n in got), type(start)


@pytest.mark.parametrize("name", ["GPT-2", "ViT", "Llama"])
def test_a_loaded_adapter_finds_its_modules_when_it_is_applied(tmp_path: Path, name: str) -> None:
    kind, config, sizes, settings = MODELS[name]
    base = saved(tmp_path / "base", getattr(hf, kind)(getattr(hf, config)(**sizes)))
    settings = {**settings, "modules_to_save": None}
    model = adapted(tmp_path / "adapter", base, **settings)
    vector = TaskVector.load(tmp_path / "adapter")
    assert torch.allclose(result(vector.apply(base)), result(model), atol=1e-5)
    out = (2 * vector - vector).apply(tmp_path / "base").save(tmp_path / "out")
    assert torch.allclose(result(type(base).from_pretrained(out).eval()), result(model), atol=1e-5)


@pytest.mark.parametrize("original", [True, False])
def test_an_adapter_of_experts_that_an_older_transformers_had(
    tmp_path: Path, original: bool
) -> None:
    """peft converts such an adapter when it loads it; the base's file may be of either kind."""
    torch.manual_seed(0)
    sizes = {**TEXT, "num_local_experts": 2, "num_key_value_heads": 1}
    base = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes))
    base = saved(tmp_path / "base", base, save_original_format=original)
    module, tensors = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.{}", {}
    widths = {"w1": (16, 32), "w3": (16, 32), "w2": (32, 16)}
    for layer in range(2):
        for expert in range(2):
            for name, (into, out) in widths.items():
                stem = module.format(layer, expert, name)
                tensors[f"{stem}.lora_A.weight"] = torch.randn(2, into)
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 2)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(widths)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), tmp_path / "adapter")
    out = merge([tmp_path / "adapter"], "task_arithmetic", base=tmp_path / "base").save(
        tmp_path / "out"
    )
    got = type(base).from_pretrained(out).eval()
    assert torch.allclose(result(got), result(model.eval()), atol=1e-4)


def test_without_transformers_the_ties_of_a_base_are_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path / "base", hf.LlamaForCausalLM(hf.LlamaConfig(**TIED)))
    adapted(tmp_path / "inside", base, target_modules=["q_proj"])
    adapted(tmp_path / "end", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert TaskVector(tmp_path / "base", tmp_path / "inside").norm() > 0
    with pytest.raises(MissingExtraError, match="transformers is needed"):
        TaskVector(tmp_path / "base", tmp_path / "end")
