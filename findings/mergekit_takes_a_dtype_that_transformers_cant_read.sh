#!/bin/sh
# mergekit==0.1.5, transformers==5.24.0, torch==2.13.0, CPU. `dtype: torch.bfloat16` in a merge recipe, as PyTorch
# prints the type.
# Expected: read as bfloat16 and written to the config so, or refused as an unknown dtype.
# Seen: the tensors are merged in bfloat16 as meant, but config.json gets "dtype": "torch.bfloat16", and from_pretrained
# of the merged folder raises AttributeError: module 'torch' has no attribute 'torch.bfloat16'. `dtype: bfloat16` is
# right.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mergekit==0.1.5 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import json
import sys

import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
folder, seen = sys.argv[1], {}
for name in ("one", "two"):
    transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/{name}")
for dtype in ("bfloat16", "torch.bfloat16"):
    out = f"{folder}/{dtype}"
    models = [{"model": f"{folder}/{name}", "parameters": {"weight": 0.5}} for name in ("one", "two")]
    recipe = {"models": models, "merge_method": "linear", "dtype": dtype}
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(recipe), out, options=options)
    try:
        seen[dtype] = str(transformers.LlamaForCausalLM.from_pretrained(out).dtype)
    except AttributeError as error:
        seen[dtype] = str(error)
    written = json.load(open(f"{out}/config.json"))["dtype"]
    held = {str(tensor.dtype) for tensor in load_file(f"{out}/model.safetensors").values()}
    print(f"dtype: {dtype}: the file holds {held}, config says {written}; read: {seen[dtype]}")
sys.exit(seen != {"bfloat16": "torch.bfloat16", "torch.bfloat16": "module 'torch' has no attribute 'torch.bfloat16'"})
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
