#!/bin/sh
# peft==0.21.2, transformers==5.24.0, torch==2.13.0, CPU. A search for the best mixture of two LoRAs:
# add_weighted_adapter(["one", "two"], [w, 1 - w], "mixture", combination_type="cat") for w in 0, 0.5, 1, each time
# under the same name, with an evaluation in between.
# Expected: each call makes the mixture it is asked for; or it raises that the name is taken, as add_adapter does.
# Seen: the first call makes it, all later ones return at once. Three equal evaluations of one mixture look like a flat
# curve. So for other weights, methods and adapters, even one that doesn't exist. No error, no warning.
# delete_adapter("mixture") before each call is right. Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys
import warnings

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
config = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
base = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
model = peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name="one").eval()
model.add_adapter("two", peft.LoraConfig(**config))
for name, parameter in model.named_parameters():
    if "lora_" in name:
        parameter.data = torch.randn(parameter.shape)
layer = model.base_model.model.model.layers[0].self_attn.q_proj
one, two = (layer.get_delta_weight(name).detach() for name in ("one", "two"))


def share():
    """Return the share of adapter "one" in the mixture."""
    rest = layer.get_delta_weight("mixture").detach() - two
    return round(float((rest * (one - two)).sum() / (one - two).square().sum()), 4)


def search(delete):
    found = []
    for weight in (0.0, 0.5, 1.0):
        if delete and "mixture" in model.peft_config:
            model.delete_adapter("mixture")
        model.add_weighted_adapter(["one", "two"], [weight, 1 - weight], "mixture", combination_type="cat")
        found.append(share())
    return found


with warnings.catch_warnings():
    warnings.simplefilter("error")
    same_name = search(False)
    model.add_weighted_adapter(["none such"], [1.0], "mixture", combination_type="no such")
    deleted = search(True)
try:
    model.add_adapter("one", peft.LoraConfig(**config))
    refused = False
except ValueError as error:
    refused = True
    print("add_adapter:", error)
print("asked for shares of 0, 0.5 and 1 of the first adapter; made:", same_name)
print("with delete_adapter before each call:", deleted)
sys.exit(not (same_name == [0, 0, 0] and deleted == [0, 0.5, 1] and refused))
PY
"$folder/venv/bin/python" "$folder/try.py"
