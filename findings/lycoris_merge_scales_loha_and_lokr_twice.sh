#!/bin/sh
# lycoris-lora==4.1.3, torch==2.13.0, CPU. LoHa and LoKr on an nn.Linear, alpha / rank = 0.5.
# Expected: the merged weight computes what the trained module computes, W + 0.5 delta.
# Seen: get_merged_weight (which merge_to uses) gives W + 0.25 delta: alpha / rank is counted twice. LoCon is right.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lycoris-lora==4.1.3 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

ratios = {}
for kind in (LoConModule, LohaModule, LokrModule):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    module = kind("layer", layer, lora_dim=2, alpha=1).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
        eye = torch.eye(64)
        trained = module(eye) - layer(eye)
        merged = (module.get_merged_weight(shape=layer.weight.shape)[0] - layer.weight).T
    ratios[kind.__name__] = float((merged * trained).sum() / trained.square().sum())
    print(kind.__name__, f"merged delta over trained delta: {ratios[kind.__name__]:.3f}")
wrong = [abs(ratios[name] - 0.5) < 1e-3 for name in ("LohaModule", "LokrModule")]
sys.exit(not (all(wrong) and abs(ratios["LoConModule"] - 1) < 1e-3))
PY
"$folder/venv/bin/python" "$folder/try.py"
