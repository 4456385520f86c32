#!/bin/sh
# huggingface_hub==2.4.0, CPU. save_torch_state_dict(state, folder) removes the second name of a tied tensor
# from the CALLER'S dictionary. Expected: the argument is left as it is, as safetensors.torch.save_model leaves its module.
# Seen: ['embed.weight']; a second save of the same dictionary then notes no alias, and the name is lost without a word.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0 safetensors==0.8.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import sys
import tempfile

import torch
from huggingface_hub import save_torch_state_dict

tied = torch.arange(6.0).reshape(2, 3)
state = {"embed.weight": tied, "lm_head.weight": tied}
save_torch_state_dict(state, tempfile.mkdtemp())
print(sorted(state))
sys.exit(sorted(state) != ["embed.weight"])
PY
"$folder/venv/bin/python" "$folder/try.py"
