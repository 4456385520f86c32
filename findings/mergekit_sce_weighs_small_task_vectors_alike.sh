#!/bin/sh
# mergekit==0.1.5, transformers==5.24.0, torch==2.13.0, CPU. An SCE merge of two models of which one has moved three
# times as far from the base as the other.
# Expected: SCE weighs models, in each matrix, by the mean square of their task vectors: 0.9 and 0.1, at whatever size,
# since the weights are shares: task vectors twice as large give the same weights.
# Seen: where the mean squares sum to less than 1e-6, all models weigh alike. That is a root mean square of 0.0006 and
# 0.0002, a strong fine-tuning already: there the weights are 0.5 and 0.5, of task vectors twice as large they are 0.9
# and 0.1. So for most fine-tunings SCE's weighing does nothing, without a word. Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mergekit==0.1.5 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import copy
import subprocess
import sys

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

program, root = sys.argv[1:]
torch.manual_seed(0)
sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
base.save_pretrained(f"{root}/base")
name = "model.layers.0.mlp.down_proj.weight"
signs = {n: torch.randn(p.shape).sign() for n, p in base.named_parameters()}


def weights(far, near):
    """Return both models' weights in the merge, in one matrix; arguments are root mean squares."""
    taus = []
    for place, size in (("far", far), ("near", near)):
        model = copy.deepcopy(base)
        for key, parameter in model.named_parameters():
            move = 0.1 + torch.rand(parameter.shape)
            move = move * size / move.square().mean().sqrt()
            parameter.data = parameter.data + move * signs[key]  # equal signs, so that none is erased
        model.save_pretrained(f"{root}/{place}")
        taus.append((model.get_parameter(name) - base.get_parameter(name)).detach().flatten())
    with open(f"{root}/recipe.yml", "w") as file:
        file.write("merge_method: sce\n")
        file.write(f"base_model: {root}/base\n")
        file.write(f"models:\n- model: {root}/far\n- model: {root}/near\n")
        file.write("dtype: float32\n")
    command = [program, f"{root}/recipe.yml", f"{root}/merged", "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)
    merged = load_file(f"{root}/merged/model.safetensors")[name]
    change = (merged - base.get_parameter(name).detach()).flatten()
    found = torch.linalg.lstsq(torch.stack(taus, 1), change[:, None]).solution.flatten()
    print(f"root mean squares {far} and {near}: weights {found[0]:.2f} and {found[1]:.2f}")
    return [round(float(weight), 2) for weight in found]


small, twice, large = weights(0.0006, 0.0002), weights(0.0012, 0.0004), weights(0.06, 0.02)
sys.exit(not (small == [0.5, 0.5] and twice == [0.9, 0.1] and large == [0.9, 0.1]))
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder/venv/bin/mergekit-yaml" "$folder"
