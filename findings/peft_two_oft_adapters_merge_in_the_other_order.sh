#!/bin/sh
# peft==0.21.2, torch==2.13.0, CPU. Two active OFT adapters on a linear layer, set_adapter(["one", "two"]), and then
# merge_and_unload.
# Expected: the merged layer computes what the layer with both adapters computes, as with two active BOFT, HRA, LoRA or
# IA3 adapters.
# Seen: the active layer turns its inputs by "one" first, then by "two"; merging multiplies the weight by "one", then by
# "two", which turns the inputs by "two" first. Rotations don't commute, so the merged model is another one: it equals
# the model with the adapters active in the reverse order. No error, no warning.
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
        self.layer = torch.nn.Linear(12, 8)
        self.config = {"model_type": "custom"}

    def forward(self, inputs):
        return self.layer(inputs)


def errors(config):
    """Return how far the merged layer is from the active one, and from the reverse order."""
    torch.manual_seed(0)
    model, inputs = peft.get_peft_model(Net(), config, adapter_name="one"), torch.randn(9, 12)
    model.add_adapter("two", copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "one" in name or "two" in name:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    model.eval()
    with torch.no_grad():
        model.base_model.set_adapter(["two", "one"])
        reverse = model(inputs)
        model.base_model.set_adapter(["one", "two"])
        active = model(inputs)
        merged = model.merge_and_unload()(inputs)
    return [float((merged - other).abs().max()) for other in (active, reverse)]


configs = {
    "OFT": peft.OFTConfig(target_modules=["layer"], oft_block_size=4),
    "HRA": peft.HRAConfig(target_modules=["layer"], r=2),
    "LoRA": peft.LoraConfig(target_modules=["layer"], r=2),
}
seen = {name: errors(config) for name, config in configs.items()}
for name, (active, reverse) in seen.items():
    print(f"{name}: merged is {active:.1e} from active, {reverse:.1e} from the reverse order")
small = 1e-5
sys.exit(
    not (
        seen["OFT"][0] > 0.05
        and seen["OFT"][1] < small
        and seen["HRA"][0] < small
        and seen["LoRA"][0] < small
    )
)
PY
"$folder/venv/bin/python" "$folder/try.py"
