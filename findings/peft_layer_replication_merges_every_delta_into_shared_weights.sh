#!/bin/sh
# peft==0.21.2, transformers==5.24.0, torch==2.13.0, CPU. LoRA with layer_replication=[[0, 2], [1, 3]]: layers 1 and 2
# of the deepened Llama share layer 1's weights, and each has a LoRA of its own.
# Expected: merge_and_unload gives each layer a weight of its own, W + its delta, or refuses.
# Seen: both deltas are added to the one shared weight, so both layers hold W + delta 1 + delta 2, without a warning.
# The merged model's outputs aren't the trained one's.
# Known upstream (huggingface/peft 1707, closed). Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import peft
import torch
import transformers

torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
config = peft.LoraConfig(
    r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]], init_lora_weights=False
)
model = peft.get_peft_model(base, config).eval()
layers = [layer.self_attn.q_proj for layer in model.base_model.model.model.layers]
before = [layer.base_layer.weight.detach().clone() for layer in layers]
deltas = [layer.get_delta_weight("default").detach() for layer in layers]
ids = torch.arange(8)[None]
with torch.no_grad():
    trained = model(ids).logits
    merged = model.merge_and_unload()
    off = float((merged(ids).logits - trained).abs().max())
print(f"merged logits off by {off:.1e} (their size is {float(trained.abs().max()):.1e})")
after = [layer.self_attn.q_proj.weight.detach() for layer in merged.model.layers]
own = [torch.allclose(after[i], before[i] + deltas[i], atol=1e-6) for i in range(4)]
both = [torch.allclose(after[i], before[i] + deltas[1] + deltas[2], atol=1e-6) for i in range(4)]
print("layer holds W + its own delta:", own)
print("layer holds W + deltas of layers 1 and 2:", both)
sys.exit(not (off > 1e-3 and own == [True, False, False, True] and both[1] and both[2]))
PY
"$folder/venv/bin/python" "$folder/try.py"
