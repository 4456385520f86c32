#!/bin/sh
# peft==0.21.2, torch==2.13.0, CPU. Two active C3A adapters on a square nn.Linear. C3A adds a delta to the weight.
# Expected: both deltas are added, as with two active LoRA, LoHa or VeRA adapters: x W + x D1 + x D2.
# Seen: the second gets the first's output as its input, x W + x D1 + x D1 D2. merge_adapter adds the two deltas, so
# that the merged model computes something else than the running one, without a warning. One adapter alone is right.
# Known upstream (huggingface/peft 3164, closed). Exits 1 if the behaviour has changed.
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
        self.layer = torch.nn.Linear(16, 16)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.layer(x)


def two(config):
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["first", "second"])
    layer = model.base_model.model.layer
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name:
                parameter.add_(torch.randn_like(parameter))
        x, (first, second) = torch.randn(5, 16), map(layer.get_delta_weight, ("first", "second"))
        running, base = model(x), layer.base_layer(x)
        model.merge_adapter()
        merged = model(x)
    return {
        "merged is the sum": torch.allclose(merged, base + x @ (first + second).T, atol=1e-3),
        "running is the sum": torch.allclose(running, base + x @ (first + second).T, atol=1e-3),
        "running is a chain": torch.allclose(running, base + x @ first.T + x @ first.T @ second.T, atol=1e-3),
    }


lora = two(peft.LoraConfig(r=4, target_modules=["layer"]))
c3a = two(peft.C3AConfig(block_size=4, target_modules=["layer"]))
print("LoRA", lora)
print("C3A ", c3a)
sys.exit(not (list(lora.values()) == [True, True, False] and list(c3a.values()) == [True, False, True]))
PY
"$folder/venv/bin/python" "$folder/try.py"
