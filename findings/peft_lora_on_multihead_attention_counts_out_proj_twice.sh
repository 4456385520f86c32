#!/bin/sh
# peft==0.21.2, torch==2.13.0, CPU. LoRA on torch.nn.MultiheadAttention (target_modules=["attn"]).
# Expected: in_proj and out_proj each get their own delta B A once.
# Seen: in_proj gets its delta once, and out_proj TWICE, in the running model and after merge_and_unload.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import copy
import sys

import peft
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.attn(x, x, x)[0]


torch.manual_seed(0)
base = Net().eval()
config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn"], init_lora_weights=False)
model = peft.get_peft_model(copy.deepcopy(base), config).eval()
layer = model.base_model.model.attn


def delta(part):
    return part.lora_B["default"].weight @ part.lora_A["default"].weight


x, inner, outer = torch.randn(1, 3, 16), delta(layer), delta(layer.base_layer.out_proj)
running, distance = model(x), {}
for times in (1, 2):
    by_hand = copy.deepcopy(base)
    with torch.no_grad():
        by_hand.attn.in_proj_weight += inner
        by_hand.attn.out_proj.weight += times * outer
    distance[times] = float((by_hand(x) - running).abs().max())
    print(f"{times} x delta of out_proj: off by {distance[times]:.1e}")
merged = model.merge_and_unload().attn.out_proj.weight
print("merged: off by", f"{float((merged - base.attn.out_proj.weight - 2 * outer).abs().max()):.1e}")
sys.exit(not (distance[2] < 1e-5 < 1e-2 < distance[1]))
PY
"$folder/venv/bin/python" "$folder/try.py"
