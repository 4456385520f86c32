#!/bin/sh
# peft==0.21.2, torch==2.13.0, CPU. add_weighted_adapter(["one"], [1.0], "copy", combination_type="cat"): one adapter,
# weight one.
# Expected: "copy" computes what "one" does, as it does for plain LoRA; or a refusal.
# Seen: of an rsLoRA adapter of rank 4 it is the delta times 2 (the root of the rank: alpha becomes the rank, the
# scaling is still divided by its root). Of a DoRA adapter it has fresh magnitudes, with lora_bias=True a fresh zero
# bias. No error, no warning. So for "svd" and "linear".
# Known upstream (huggingface/peft 3761). Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import peft
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(12, 8)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.layer(x)


def effects(way, settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["layer"], **settings)
    model = peft.get_peft_model(Net(), config, adapter_name="one").eval()
    rank = {"svd_rank": 4} if way == "svd" else {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        model.add_weighted_adapter(["one"], [1.0], "copy", combination_type=way, **rank)
        x = torch.randn(5, 12)
        base, effect = model.base_model.model.layer.base_layer(x), {}
        for name in ("one", "copy"):
            model.set_adapter(name)
            effect[name] = model(x) - base
    return effect["one"], effect["copy"]


kinds = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}, "bias": {"lora_bias": True}}
as_said = []
for way in ("cat", "svd", "linear"):
    for kind, settings in kinds.items():
        want, got = effects(way, settings)
        off, twice = (float((got - n * want).norm() / want.norm()) for n in (1, 2))
        print(f"{way}, {kind}: off by {off:.2f} of the effect, from twice the effect by {twice:.2f}")
        as_said.append({"LoRA": off < 1e-4, "rsLoRA": twice < 1e-4}.get(kind, off > 0.05))
sys.exit(not all(as_said))
PY
"$folder/venv/bin/python" "$folder/try.py"
