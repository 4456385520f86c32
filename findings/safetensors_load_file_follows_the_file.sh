#!/bin/sh
# safetensors==0.8.0, torch==2.13.0, CPU, Linux. load_file, then another checkpoint of the same shapes is written over
# the file's bytes (as rsync --inplace does, or a training script that updates its file).
# Expected: a dictionary that was loaded stays what it is, as torch.load's does.
# Seen: the loaded tensors have the new file's values, except for pages of memory that were edited in place since: one
# dictionary, even one tensor, mixes two checkpoints. safe_open's get_tensor, too, after the file was closed. A clone()
# is safe.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file


def checkpoint(value):
    return {name: torch.full((64, 64), value) for name in ("edited", "kept")}


folder = sys.argv[1]
save_file(checkpoint(1.0), f"{folder}/model.safetensors")
torch.save(checkpoint(1.0), f"{folder}/model.pt")
loaded = load_file(f"{folder}/model.safetensors")
with safe_open(f"{folder}/model.safetensors", "pt") as file:
    taken = file.get_tensor("kept")
pickled = torch.load(f"{folder}/model.pt")
loaded["edited"].mul_(10)
with open(f"{folder}/model.safetensors", "r+b") as file:
    file.write(save(checkpoint(2.0)))
tensors = {"times 10": loaded["edited"], "load_file": loaded["kept"], "get_tensor": taken, "torch.load": pickled["kept"]}
seen = {name: tensor.unique().tolist() for name, tensor in tensors.items()}
print("ones were loaded, then twos written; now:", seen)
mixed = seen.pop("load_file")
sys.exit(not (2.0 in mixed and seen == {"times 10": [10.0], "get_tensor": [2.0], "torch.load": [1.0]}))
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
