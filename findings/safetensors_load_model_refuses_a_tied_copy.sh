#!/bin/sh
# safetensors==0.8.0, CPU. load_model(module, file) refuses a file that holds both names of a tied tensor, each with a
# copy of its own. Expected: it loads, as module.load_state_dict(load_file(file)) does with the same file, and as
# load_model itself does with a file that holds one of the names.
# Seen: "matched", then RuntimeError: Unexpected key(s) in state_dict: "head.weight".
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import sys
import tempfile

import torch
from safetensors.torch import load_file, load_model, save_file


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)
        self.head = torch.nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight


file = tempfile.mkdtemp() + "/model.safetensors"
save_file({name: tensor.clone() for name, tensor in Tied().state_dict().items()}, file)
Tied().load_state_dict(load_file(file))
print("matched")
try:
    load_model(Tied(), file)
except RuntimeError as error:
    print(f"RuntimeError: {' '.join(str(error).split())}")
    sys.exit("head.weight" not in str(error))
sys.exit(1)
PY
"$folder/venv/bin/python" "$folder/try.py"
