#!/bin/sh
# transformers==5.24.0, torch==2.13.0, CPU. model.save_pretrained(folder, state_dict=merged), to write merged or edited
# weights under the model's configuration, twice: for two places, or with a coefficient more in a loop.
# Expected: the argument is only read, and both folders hold the model; or the second call is refused.
# Seen: save_pretrained pops every tensor from the caller's dictionary. The second call writes a folder with config.json
# and no weights at all, without an error, and whatever computes with the dictionary later computes with nothing. The
# first folder is right.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 torch==2.13.0 safetensors==0.8.0 numpy
cat > "$folder/try.py" <<'PY'
import os
import sys
import tempfile

from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
merged = {name: 2 * tensor for name, tensor in model.state_dict().items()}
count, left, written = len(merged), [], []
for _ in range(2):
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder, state_dict=merged)
    left.append(len(merged))
    files = sorted(os.listdir(folder))
    weights = os.path.join(folder, "model.safetensors")
    written.append(len(load_file(weights)) if os.path.exists(weights) else 0)
    print(f"{files}: {written[-1]} of {count} tensors; the dictionary has {left[-1]} left")
sys.exit(written != [count, 0] or left != [0, 0])
PY
"$folder/venv/bin/python" "$folder/try.py"
