"""Settings of peft together: the merge is peft's own, on models of several architectures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from weightops import TaskVector, merge
from weightops.errors import MismatchError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
SIZES["num_hidden_layers"] = 3
GPT2 = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 8}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "bos_token_id": 0, "eos_token_id": 0}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {**RESNET, "layer_type": "basic"}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "biases beside a head": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "biases beside whole norms": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_1"]},
    ),
    "the same with DoRA": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_1"], "use_dora": True},
    ),
    "whole modules among the targets": (
        "bert",
        {"target_modules": "all-linear", "modules_to_save": ["dense"], "use_dora": True},
    ),
    "excluded modules, too": (
        "bert",
        {
            "target_modules": "all-linear",
            "modules_to_save": ["dense"],
            "exclude_modules": ["query"],
            "use_dora": True,
        },
    ),
    "patterns and layers": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj", "up_proj"],
            "rank_pattern": {r"^model\.layers\.0\.mlp\.up_proj": 5, "up_proj": 3},
            "alpha_pattern": {"down_proj": 7},
            "exclude_modules": r".*\.1\.mlp\.down_proj",
            "layers_to_transform": [0, 2],
            "use_rslora": True,
        },
    ),
    "stated orientation": ("gpt2", {"target_modules": ["c_proj", "wpe"], "fan_in_fan_out": True}),
    "convolutions": ("resnet", {"target_modules": ["convolution", "classifier.1"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    model, config, sizes = MODELS[kind]
    torch.manual_seed(0)
    getattr(hf, model)(getattr(hf, config)(**sizes)).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return getattr(hf, model).from_pretrained(tmp_path / "base").eval()

    adapted: Any = peft.get_peft_model(base(), peft.LoraConfig(r=2, bias="all", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded: Any = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    wanted = loaded.merge_and_unload().state_dict()
    pre, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    out = merge([adapter], "task_arithmetic", base=pre).save(tmp_path / "out")
    results = (
        TaskVector(base(), adapter).apply(base()).state_dict(),
        getattr(hf, model).from_pretrained(out).state_dict(),
    )
    for got in results:
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            scale = max(1.0, float(tensor.abs().max()))
            assert float((got[name] - tensor).abs().max()) <= 1e-6 * scale, name


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_alone_parts_the_ends_of_a_tied_model(tmp_path: Path) -> None:
    """A module whose ends are one tensor can't be edited so; a folder gets two tensors."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, tie_word_embeddings=True)
    base: Any = hf.LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=1, target_modules=["embed_tokens"], init_lora_weights=False)
    running: Any = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    running.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MismatchError, match="one tensor in the target and two"):
        TaskVector(base, tmp_path / "adapter").apply(base)
    pre = tmp_path / "base"
    made = TaskVector(pre, tmp_path / "adapter").apply(pre).save(tmp_path / "out")
    loaded = hf.LlamaForCausalLM.from_pretrained(made).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, running(tokens).logits, atol=1e-5)
