#!/bin/sh
# peft==0.21.2, transformers==5.24.0, torch==2.13.0, CPU. LoRA on a dense layer of DeepSeek-V3: target_modules names
# "layers.0.mlp.down_proj", an nn.Linear of the model (layer 0 has no experts).
# Expected: that layer gets the LoRA.
# Seen: it gets none, and the routed experts of layer 1 get one; without a warning. peft takes every target that ends in
# down_proj for the experts' of older transformers. target_parameters=["layers.0.mlp.down_proj.weight"] reaches the layer.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import peft
import torch
import transformers

sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12}
sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8}
sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": None}
sizes |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1}


def adapted(**target):
    torch.manual_seed(0)
    base = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes))
    assert isinstance(base.model.layers[0].mlp.down_proj, torch.nn.Linear)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **target))
    return [name for name, _ in model.named_parameters() if "lora_A" in name]


by_module = adapted(target_modules=["layers.0.mlp.down_proj"])
by_parameter = adapted(target_parameters=["layers.0.mlp.down_proj.weight"])
print("target_modules:", by_module)
print("target_parameters:", by_parameter)
begin = "base_model.model.model.layers."
seen = [f"{begin}1.mlp.experts.lora_A.default.weight"], [f"{begin}0.mlp.down_proj.lora_A.default.weight"]
sys.exit((by_module, by_parameter) != seen)
PY
"$folder/venv/bin/python" "$folder/try.py"
