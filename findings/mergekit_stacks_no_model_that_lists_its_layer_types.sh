#!/bin/sh
# mergekit==0.1.5 (requires transformers>=5.0,<6.0), transformers==5.24.0, torch==2.13.0, CPU. A passthrough stack of
# layers 0-2 and 1-3 of one model of four layers.
# Expected: a model of six layers, as for Llama; or a refusal before any work.
# Seen: for Qwen2 (so Qwen3, Gemma 2) the weights are merged, then writing the config raises: mergekit sets
# num_hidden_layers to six, and transformers 5 refuses it beside the config's four layer_types, which mergekit doesn't
# know of.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mergekit==0.1.5 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import os
import sys

import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
seen = {}
for kind in ("llama", "qwen2"):
    model, out = f"{sys.argv[1]}/{kind}", f"{sys.argv[1]}/{kind}-stacked"
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    parts = [{"sources": [{"model": model, "layer_range": rows}]} for rows in ([0, 3], [1, 4])]
    recipe = {"slices": parts, "merge_method": "passthrough", "dtype": "float32"}
    options = MergeOptions(copy_tokenizer=False, clone_tensors=True, quiet=True)
    try:
        run_merge(MergeConfiguration.model_validate(recipe), out, options=options)
        seen[kind] = transformers.AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers
    except Exception as error:
        seen[kind] = str(error)
    print(kind, "->", seen[kind], sorted(os.listdir(out)) if os.path.isdir(out) else "no folder")
sys.exit(not (seen["llama"] == 6 and "must be equal to the number of `layer_types`" in str(seen["qwen2"])))
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
