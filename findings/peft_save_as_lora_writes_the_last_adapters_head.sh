#!/bin/sh
# peft==0.21.2, transformers==5.24.0, torch==2.13.0, CPU. A classifier with two LoHa adapters, each with a head of its
# own (modules_to_save=["classifier"]); save_as_lora(folder, model, rank, adapter_name="one").
# Expected: the LoRA and the head of "one", as save_pretrained writes each adapter with its own head.
# Seen: the LoRA is that of "one", the head that of "two", the adapter that was added last, whichever is active. No
# error, no warning: the converted model has one task's layers under another task's head. A head of two layers
# (RoBERTa's dense and out_proj) is written as one weight and one bias, and the folder can't be loaded (KeyError).
# Related upstream: huggingface/peft 3481 (buffers of such modules). Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 numpy
cat > "$folder/try.py" <<'PY'
import copy
import sys

import peft
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification
from transformers import RobertaConfig, RobertaForSequenceClassification

torch.manual_seed(0)
sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
sizes |= {"num_attention_heads": 2, "num_labels": 3}
bert = BertForSequenceClassification(BertConfig(**sizes)).eval()
roberta = RobertaForSequenceClassification(RobertaConfig(**sizes)).eval()
ids = torch.arange(2, 10)[None]


def config():
    settings = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    return peft.LoHaConfig(r=2, task_type="SEQ_CLS", **settings)


def train(model, name):
    model.set_adapter(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))


def logits(model):
    with torch.no_grad():
        return model(ids).logits


model = peft.get_peft_model(copy.deepcopy(bert), config(), adapter_name="one").eval()
model.add_adapter("two", config())
for name in ("one", "two"):
    train(model, name)
heads = model.base_model.model.classifier.modules_to_save
model.save_pretrained(sys.argv[1] + "/saved")
whose, off = {}, {}
for name in ("one", "two"):
    model.set_adapter(name)
    folder = f"{sys.argv[1]}/{name}"
    peft.save_as_lora(folder, model, rank=16, adapter_name=name)
    for place, of in ((f"saved/{name}", "save_pretrained"), (name, "save_as_lora")):
        head = load_file(f"{sys.argv[1]}/{place}/adapter_model.safetensors")
        head = head["base_model.model.classifier.weight"]
        whose[of, name] = [other for other in heads if torch.equal(heads[other].weight, head)]
    read = peft.PeftModel.from_pretrained(copy.deepcopy(bert), folder).eval()
    off[name] = float((logits(read) - logits(model)).abs().max())
    read.base_model.model.classifier.modules_to_save["default"].load_state_dict(heads[name].state_dict())
    mended = float((logits(read) - logits(model)).abs().max())
    print(f"{name}: the head in the file is of {whose['save_as_lora', name]}, with save_pretrained of")
    print(f"  {whose['save_pretrained', name]}; logits off by {off[name]:.0e}, with its own head {mended:.0e}")
    off[name, "mended"] = mended
right = all(whose["save_pretrained", name] == [name] for name in heads)
wrong = all(whose["save_as_lora", name] == ["two"] for name in heads)
model = peft.get_peft_model(copy.deepcopy(roberta), config()).eval()
peft.save_as_lora(sys.argv[1] + "/roberta", model, rank=16)
file = load_file(sys.argv[1] + "/roberta/adapter_model.safetensors")
written = sorted(key.removeprefix("base_model.model.") for key in file if "classifier" in key)
try:
    peft.PeftModel.from_pretrained(copy.deepcopy(roberta), sys.argv[1] + "/roberta")
    refused = False
except KeyError as error:
    refused = True
    print("roberta's head is written as", written, "and loading it fails for want of", error)
small = max(off["two"], off["one", "mended"], off["two", "mended"]) < 1e-4
as_said = right and wrong and small and off["one"] > 1e-2
sys.exit(not (as_said and refused and written == ["classifier.bias", "classifier.weight"]))
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
