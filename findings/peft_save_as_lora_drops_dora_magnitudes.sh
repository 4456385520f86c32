#!/bin/sh
# peft==0.21.2, transformers==5.24.0, torch==2.13.0, CPU. save_as_lora of a trained DoRA adapter, at the full rank of
# its matrices, for a program that reads plain LoRA only.
# Expected: a LoRA that computes what the DoRA model does, up to rounding, as it does for LoHa (at full rank nothing is
# lost, and merge_and_unload shows that such a delta exists); or a refusal, as for OFT.
# Seen: B A alone is written. The magnitudes, and the division by the norms of the changed rows, are in no file, so the
# model is neither the base nor what was trained. The one warning says that there is typically no need to convert LoRA.
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
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
ids, name = torch.arange(8)[None], "model.layers.0.self_attn.q_proj"


def trained(config):
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.rand_like(parameter))
    return model


def logits(model):
    with torch.no_grad():
        return model(ids).logits


targets = {"target_modules": ["q_proj", "v_proj"]}
kinds = {
    "LoHa": peft.LoHaConfig(r=2, **targets),
    "LoRA": peft.LoraConfig(r=2, lora_alpha=3, **targets),
    "DoRA": peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, **targets),
}
off = {}
for kind, config in kinds.items():
    folder, model = f"{sys.argv[1]}/{kind}", trained(config)
    peft.save_as_lora(folder, model, rank=16)
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    want = logits(model)
    off[kind] = float((logits(read) - want).norm() / (want - logits(base)).norm())
    print(f"{kind}: the converted adapter is off by {off[kind]:.0e} of the trained adapter's effect")
layer = model.base_model.model.get_submodule(name)
factors = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
written = read.base_model.model.get_submodule(name).get_delta_weight("default").detach()
plain = torch.allclose(written, factors, atol=1e-5)
merged = (model.merge_and_unload().get_submodule(name).weight - base.get_submodule(name).weight).detach()
print("DoRA: B A is what is written:", plain)
print(f"DoRA: from the merged delta it is off by {float((written - merged).norm() / merged.norm()):.2f}")
try:
    peft.save_as_lora(f"{sys.argv[1]}/OFT", trained(peft.OFTConfig(oft_block_size=4, **targets)), rank=16)
    refused = False
except TypeError as error:
    refused = True
    print("OFT:", error)
sys.exit(not (off["LoHa"] < 1e-3 and off["LoRA"] < 1e-3 and off["DoRA"] > 0.1 and plain and refused))
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
