#!/bin/sh
# mergekit==0.1.5, transformers==5.24.0, torch==2.14.1, CPU. A linear merge of one mixture of experts, which is a copy.
# Expected: all tensors of the model, as for Qwen3-MoE; or a refusal of a class that mergekit has no description of.
# Seen: of DeepSeek V3 the names are inferred ("No JSON architecture found", a warning), and the routed experts of all
# layers are left out: 29 of 41 tensors are written, the run succeeds, and transformers fills the experts with random
# numbers.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mergekit==0.1.5 torch==2.14.1 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
kinds = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
lost = {}
for kind, own in kinds.items():
    model, out = f"{sys.argv[1]}/{kind}", f"{sys.argv[1]}/{kind}-merged"
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, **own)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    entry = {"model": model, "parameters": {"weight": 1}}
    recipe = {"models": [entry], "merge_method": "linear", "dtype": "float32"}
    run_merge(MergeConfiguration.model_validate(recipe), out, MergeOptions(copy_tokenizer=False, quiet=True))
    _, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    lost[kind] = sorted(name for name in told["missing_keys"] if ".mlp." in name)
    files = len(load_file(f"{model}/model.safetensors")), len(load_file(f"{out}/model.safetensors"))
    print(f"{kind}: {files[0]} tensors in, {files[1]} out; random after loading: {lost[kind]}")
sys.exit(not (not lost["qwen3_moe"] and any("experts" in name for name in lost["deepseek_v3"])))
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
