#!/bin/sh
# mergekit==0.1.5, transformers==5.24.0, torch==2.13.0, CPU. A linear merge of two slices, of which the first takes its
# layers from one model and the last takes the mean of two.
# Expected: the norm and the head behind the last slice are the mean of the last slice's two models, as its layers are;
# so they are where both slices have two models.
# Seen: the layers are the mean, but norm and head are the last slice's first model's alone, without a word: as many
# models count there as the first slice has.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mergekit==0.1.5 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
folder, models, seen = sys.argv[1], {}, {}
for seed, name in enumerate(("one", "two")):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(f"{folder}/{name}")
    models[name] = model.state_dict()


def source(name, first):
    return {"model": f"{folder}/{name}", "layer_range": [first, first + 1], "parameters": {"weight": 1}}


last = {"sources": [source("one", 1), source("two", 1)]}
for count, sources in ((1, [source("one", 0)]), (2, [source("one", 0), source("two", 0)])):
    out = f"{folder}/out{count}"
    recipe = {"slices": [{"sources": sources}, last], "merge_method": "linear", "dtype": "float32"}
    run_merge(MergeConfiguration.model_validate(recipe), out, MergeOptions(copy_tokenizer=False, quiet=True))
    merged = load_file(f"{out}/model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        one, two = (models[model][name] for model in ("one", "two"))
        is_mean = torch.allclose(merged[name], (one + two) / 2, atol=1e-6)
        seen[count, name] = "mean" if is_mean else "one" if torch.equal(merged[name], one) else "other"
        print(f"first slice of {count} model(s): {name} is the last slice's {seen[count, name]}")
sys.exit(list(seen.values()) != ["mean", "one", "mean", "mean"])
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
