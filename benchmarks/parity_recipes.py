"""Run recipes as people write them for mergekit in both programs, whole: tokenizers included.

    python benchmarks/parity_recipes.py --mergekit VENV/bin [NAME...]

Tiny Llamas with tokenizers, some of which have tokens that others lack, and an adapter, are merged
by mergekit 0.1.5 and by `weightops merge` from the same files, those in parity_recipes.yaml. The
table has the largest difference of the merged tensors relative to the largest element, and the
share of elements that differ by more than rounding; for methods that draw at random, the ratio of
the norms of the change. Recipes that consist of several documents are run by mergekit-multi, those
of mixtures of experts by mergekit-moe. Last, mergekit-extract-lora and `weightops vector --lora`
make an adapter of rank 4: of the same layers, with the products of their pairs, and the errors.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

RANDOM = ("dare linear one", "dare ties normalized gradient", "della")
RECIPES: dict[str, str] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
MODELS = re.compile(
    r"\b(model|(?:base|source)_model|source|tokenizer_source): "
    r"(base\+lora|(?:\w+/)?(?:base|[abc])|chat|half|qwen2/apart)\b(?!/)"
)
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "gpt2": {},
    "mixtral": {"num_local_experts": 3},
    "mamba": {"state_size": 4},
    "olmo2": {},
    "granite": {},
    "stablelm": {},
    "starcoder2": {},
    "glm4": {"head_dim": 8, "pad_token_id": 0},
}
"""Other architectures than Llama, each with base, a, b and c, and what is theirs alone."""
ADAPTERS = "extract-lora"
PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


def make(folder: Path) -> None:
    """Save base; a, b and c, which are near to it; half, which is c in bf16; chat, which has two
    more tokens; and lora."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(45))]
    torch.manual_seed(0)
    start: dict[str, torch.Tensor] = {}
    for name in ("base", "a", "b", "c", "chat"):
        extra = ["<|im_start|>", "<|im_end|>"] if name == "chat" else []
        plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        tokenizer.add_tokens(extra, special_tokens=True)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
        for key, value in model.state_dict().items():
            old = start.setdefault(key, value.clone())
            if name != "base":
                value[: len(old)] = old + 0.01 * torch.randn_like(old)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "c":
            model.to(torch.bfloat16).save_pretrained(folder / "half")
            tokenizer.save_pretrained(folder / "half")
    adapter = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapter.save_pretrained(folder / "lora")


def make_others(folder: Path, names: set[str]) -> None:
    """Save the models of other architectures that recipes name."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for name in names:
        sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
        own = sizes if name == "gpt2" else {**SIZES, **OTHERS[name]}
        start: dict[str, torch.Tensor] = {}
        for i, kin in enumerate(("base", "a", "b", "c")):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **own))
            generator = torch.Generator().manual_seed(i)
            for key, value in model.named_parameters():
                noise = torch.randn(value.shape, generator=generator)
                old = start.setdefault(key, value.data + 0.05 * noise)
                value.data.copy_(old + 0.02 * noise if i else old)
            model.save_pretrained(folder / name / kin)
            tokenizer.save_pretrained(folder / name / kin)
        if name == "qwen2":  # tied: one more, whose head is apart
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(1.1 * model.lm_head.weight.data)
            model.save_pretrained(folder / name / "apart")
            tokenizer.save_pretrained(folder / name / "apart")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder; Mixtral's experts each by itself, as the Hub's files have them."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            layer, _, part = name.rpartition(".mlp.experts.")
            if part in PARTS:
                for i, expert in enumerate(value.double()):
                    for own, half in zip(PARTS[part], expert.chunk(len(PARTS[part])), strict=True):
                        found[f"{layer}.block_sparse_moe.experts.{i}.{own}.weight"] = half
            elif name.endswith(".mlp.gate.weight"):
                found[name.replace("mlp", "block_sparse_moe")] = value.double()
            else:
                found[name] = value.double()
    return found


def compare(name: str, folder: Path, ours: Path, theirs: Path) -> dict[str, Any]:
    a, b, base = tensors(ours), tensors(theirs), tensors(folder / "base")
    if {n: t.shape for n, t in a.items()} != {n: t.shape for n, t in b.items()}:
        raise SystemExit(f"{name}: the outputs hold different tensors")
    if name in RANDOM:
        same = [n for n in a if n in base and base[n].shape == a[n].shape]
        x, y = (sum((t[n] - base[n]).square().sum().item() for n in same) for t in (a, b))
        return {"norm ratio": round((x / y) ** 0.5, 3)}
    dtype = ["float32", *re.findall(r"dtype: (\w+)", RECIPES[name])][-1]
    scale = max(tensor.abs().max().item() for tensor in b.values())
    limit = 8 * torch.finfo(getattr(torch, dtype)).eps * scale
    differences = torch.cat([(a[n] - b[n]).abs().flatten() for n in a])
    return {
        "largest": float(f"{differences.max().item() / scale:.2g}"),
        "beyond rounding": float(f"{(differences > limit).double().mean().item():.2g}"),
    }


def compare_adapters(folder: Path, scripts: Path) -> dict[str, Any]:
    """Adapters of all linear layers and embeddings: their products and what they lose."""
    theirs, ours = folder / "theirs lora", folder / "ours lora"
    kit = [str(scripts / "mergekit-extract-lora"), "--embed-lora", "--skip-undecomposable"]
    models = ["--model", "./a", "--base-model", "./base"]
    run([*kit, *models, "--max-rank", "4", "--out-path", str(theirs)], folder)
    weightops = [sys.executable, "-m", "weightops", "vector", "./base", "./a", "--lora", "4"]
    run([*weightops, "-o", str(ours)], folder)
    a, b, base, tuned = map(tensors, (ours, theirs, folder / "base", folder / "a"))
    if a.keys() != b.keys():
        raise SystemExit(f"adapters of other layers: {sorted(a.keys() ^ b.keys())[:6]}")
    largest, lost, total = 0.0, [0.0, 0.0], 0.0
    for first in (name for name in a if "lora_A" in name or "embedding_A" in name):
        second = first.replace("_A", "_B")
        name = first.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
        delta = tuned[name] - base[name]
        delta = delta.T if "embedding" in first else delta
        products = [pairs[second] @ pairs[first] for pairs in (a, b)]
        largest = max(largest, ((products[0] - products[1]).norm() / delta.norm()).item())
        total += delta.square().sum().item()
        lost = [
            old + (delta - p).square().sum().item() for old, p in zip(lost, products, strict=True)
        ]
    errors = [round((part / total) ** 0.5, 6) for part in lost]
    return {"layers": len(a) // 2, "largest": float(f"{largest:.2g}"), "errors": errors}


def with_path(found: re.Match[str]) -> str:
    """A key with the folder of the model that it names; ``source: base`` names none."""
    key, model = found.groups()
    keyword = key.endswith("source") and model == "base"
    return found[0] if keyword else f"{key}: ./{model.replace('+', '+./')}"


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="recipes; by default all")
    parser.add_argument("--mergekit", type=Path, required=True, help="a bin folder with mergekit")
    results = Path(__file__).parent / "results" / "parity_recipes.json"
    parser.add_argument("--out", type=Path, default=results)
    args = parser.parse_args()
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder)
        texts = [RECIPES[name] for name in args.names or RECIPES if name in RECIPES]
        make_others(folder, {name for name in OTHERS if any(f" {name}/" in t for t in texts)})
        for name in args.names or [*RECIPES, ADAPTERS]:
            if name == ADAPTERS:
                report[name] = compare_adapters(folder, args.mergekit)
                print(f"{name:36} {json.dumps(report[name])}", flush=True)
                args.out.write_text(json.dumps(report, indent=2) + "\n")
                continue
            text = MODELS.sub(with_path, RECIPES[name])
            (folder / "recipe.yml").write_text(text)
            ours, theirs = folder / f"ours {name}", folder / f"theirs {name}"
            single = ["mergekit-yaml", "recipe.yml", str(theirs), "--lora-merge-cache", "loras"]
            parts = folder / f"{name}_parts".replace(" ", "_")  # mergekit-multi takes no spaces
            several = ["mergekit-multi", "recipe.yml", "-I", str(parts), "--out-path"]
            kit = [*several, str(theirs)] if "---" in text else single
            kit = ["mergekit-moe", "recipe.yml", str(theirs)] if "experts:" in text else kit
            run([str(args.mergekit / kit[0]), *kit[1:]], folder)
            run([sys.executable, "-m", "weightops", "merge", "recipe.yml", "-o", str(ours)], folder)
            report[name] = compare(name, folder, ours, theirs)
            print(f"{name:36} {json.dumps(report[name])}", flush=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
