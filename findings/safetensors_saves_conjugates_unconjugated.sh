#!/bin/sh
# safetensors==0.8.0, torch==2.13.0, CPU. save_file of a complex weight that is a conjugate, as z.conj() or the spectral
# parameters of Fourier and state-space layers give it.
# Expected: load_file gives the tensor back, as torch.load does after torch.save; or an error, as save_file raises one
# for other lazy layouts, such as x.t().
# Seen: PyTorch conjugates lazily, by a bit of the tensor. save_file finds it contiguous and writes the memory below, so
# the file holds z: all imaginary parts have the wrong sign. No error, no warning. Of the tensors in one dictionary only
# those with the bit are wrong.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import io
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

poles = torch.tensor([1 + 2j, 3 - 4j])
state = {"plain": poles.clone(), "mirrored": poles.conj()}
place = tempfile.mkdtemp() + "/w.safetensors"
save_file(state, place)
file = io.BytesIO()
torch.save(state, file)
file.seek(0)
by_torch, by_safetensors = torch.load(file), load_file(place)
for name, tensor in state.items():
    print(name, tensor.tolist(), by_torch[name].tolist(), by_safetensors[name].tolist())
wrong = torch.equal(by_safetensors["mirrored"], poles)
right = torch.equal(by_torch["mirrored"], state["mirrored"])
sys.exit(not (wrong and right and torch.equal(by_safetensors["plain"], state["plain"])))
PY
"$folder/venv/bin/python" "$folder/try.py"
