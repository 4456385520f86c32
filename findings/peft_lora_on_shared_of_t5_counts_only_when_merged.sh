#!/bin/sh
# peft==0.21.2, transformers==5.24.0, torch==2.13.0, CPU. LoRA on "shared", the module that T5's get_input_embeddings()
# returns, with values as a trained adapter has them.
# Expected: the running model and merge_and_unload() compute one thing, as with other layers.
# Seen: the running model computes what the base does (within rounding), and nothing in it requires a gradient: encoder and
# decoder run their own embed_tokens. The merged model computes something else, since embed_tokens share the merged weight.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys
import warnings

import peft
import torch
import transformers

warnings.simplefilter("ignore")
torch.manual_seed(0)
sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
base = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
assert base.get_input_embeddings() is base.shared
tokens = torch.arange(3, 9)[None]


def logits(model):
    return model(input_ids=tokens, decoder_input_ids=tokens).logits


before = logits(base)
settings = peft.LoraConfig(r=2, target_modules=["shared"], init_lora_weights=False)
adapted = peft.get_peft_model(base, settings).eval()
running = logits(adapted)
trainable = running.requires_grad
merged = logits(adapted.merge_and_unload())
same, difference = torch.allclose(running, before, atol=1e-4), (merged - running).abs().max().item()
print("running equals base:", same)
print("depends on the LoRA:", trainable)
print(f"merged against running: {difference:.1f}")
sys.exit(not (same and not trainable and difference > 1))
PY
"$folder/venv/bin/python" "$folder/try.py"
