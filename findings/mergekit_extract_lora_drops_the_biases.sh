#!/bin/sh
# mergekit==0.1.5, peft==0.21.2, transformers==5.24.0, torch==2.13.0, CPU. mergekit-extract-lora of a fine-tuned Qwen2,
# whose q, k and v have biases, at a rank that is the whole of every matrix.
# Expected: the base with the adapter is the fine-tuned model, as with Llama: matrices at full rank, norms, embeddings,
# head whole, which the adapter lists in modules_to_save; or a warning of what it can't hold.
# Seen: all weights are exact, and every bias is the base's: the change of the biases is in no file, though a LoRA file
# has a place for it (bias="lora_only"). The program doesn't say so.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mergekit==0.1.5 peft==0.21.2 transformers==5.24.0 torch==2.13.0 tokenizers numpy
cat > "$folder/try.py" <<'PY'
import copy
import subprocess
import sys

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

program, root = sys.argv[1:]
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
sizes = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def differing(name, base):
    """Return the tensors in which base and extracted adapter aren't the fine-tuned model."""
    torch.manual_seed(0)
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    places = [f"{root}/{name}-{kind}" for kind in ("base", "tuned", "lora")]
    for place, model in zip(places, (base, tuned)):
        model.save_pretrained(place)
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(place)
    command = [program, "--base-model", places[0], "--model", places[1], "--out-path", places[2]]
    run = subprocess.run(
        [*command, "--max-rank", "64"], check=True, capture_output=True, text=True
    )
    print("the program names biases:", "bias" in (run.stdout + run.stderr).lower())
    merged = PeftModel.from_pretrained(copy.deepcopy(base), places[2]).merge_and_unload()
    found = dict(merged.named_parameters())
    return [n for n, p in tuned.named_parameters() if not torch.allclose(found[n], p, atol=1e-4)]


qwen = Qwen2ForCausalLM(Qwen2Config(**sizes))
lost = {
    "llama": differing("llama", LlamaForCausalLM(LlamaConfig(**sizes))),
    "qwen2": differing("qwen2", qwen),
}
print(lost)
biases = [name for name, _ in qwen.named_parameters() if name.endswith(".bias")]
sys.exit(lost["llama"] != [] or lost["qwen2"] != biases or len(biases) != 6)
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder/venv/bin/mergekit-extract-lora" "$folder"
