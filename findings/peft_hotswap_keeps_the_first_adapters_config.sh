#!/bin/sh
# peft==0.21.2, transformers==5.24.0, torch==2.13.0, CPU. hotswap_adapter(model, folder, "default") replaces a loaded
# LoRA (r 4, alpha 8) by another one (r 4, alpha 32), and the model is saved.
# Expected: the saved adapter is the one that the model computes with, read from the second folder.
# Seen: the weights and the scaling in the layers are the second adapter's, and the model's peft_config stays the
# first's. save_pretrained writes the second's weights beside alpha 8: read again, they work at a quarter of their
# strength. So for a rank: of an adapter of rank 2 the file says 4 (its scaling is halved). No error, no warning.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import copy
import sys
import tempfile

import peft
import torch
from peft.utils.hotswap import hotswap_adapter
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)
base = LlamaForCausalLM(config)
NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def trained(rank, alpha):
    """Return the folder of an adapter."""
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
    model, folder = peft.get_peft_model(copy.deepcopy(base), lora), tempfile.mkdtemp()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def read(folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


def delta(model):
    return model.get_submodule(NAME).get_delta_weight("default").detach()


shares = []
for rank, alpha in ((4, 32), (2, 8)):
    first, second = trained(4, 8), trained(rank, alpha)
    model, folder = read(first), tempfile.mkdtemp()
    hotswap_adapter(model, second, "default")
    wanted = delta(read(second))
    assert torch.allclose(delta(model), wanted)
    model.save_pretrained(folder)
    saved = read(folder)
    again = saved.peft_config["default"]
    share = float((delta(saved) * wanted).sum() / wanted.square().sum())
    shares.append(round(share, 4))
    print(f"r {rank}, alpha {alpha}: saved as r {again.r}, alpha {again.lora_alpha}: {share:.4f} of it")
sys.exit(shares != [0.25, 0.5])
PY
"$folder/venv/bin/python" "$folder/try.py"
