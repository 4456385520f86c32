#!/bin/sh
# peft==0.21.2, transformers==5.24.0, torch==2.13.0, CPU. A trained DoRA adapter, read by model.load_adapter of
# transformers.
# Expected: the outputs that PeftModel.from_pretrained gives for the same folder, as for plain LoRA.
# Seen: lora_A and lora_B are read, the magnitude vectors aren't: they stay the norms of the base's rows, so the model
# is neither the base nor what was trained. No error: the load report calls the file's names UNEXPECTED
# (lora_magnitude_vector.default) and the model's MISSING (the same with .weight).
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import peft
import torch
import transformers


def tiny():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


ids, off = torch.arange(8)[None], {}
for kind in ("LoRA", "DoRA"):
    folder = f"{sys.argv[1]}/{kind}"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=kind == "DoRA")
    model = peft.get_peft_model(tiny(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    model.save_pretrained(folder)
    with torch.no_grad():
        trained = model(ids).logits
        by_peft = peft.PeftModel.from_pretrained(tiny(), folder).eval()
        by_transformers = tiny()
        by_transformers.load_adapter(folder)
        off[kind] = [float((m(ids).logits - trained).abs().max()) for m in (by_peft, by_transformers.eval())]
    print(kind, "logits off by", "{:.0e} (peft), {:.0e} (transformers)".format(*off[kind]))
layer = by_transformers.model.layers[0].self_attn.q_proj
read = {name: p for name, p in layer.named_parameters() if "magnitude" in name}
same = all(torch.allclose(p, layer.base_layer.weight.norm(dim=1)) for p in read.values())
print("magnitudes, as transformers has them, are the base's norms:", same)
sys.exit(not (max(off["LoRA"] + off["DoRA"][:1]) < 1e-5 and off["DoRA"][1] > 1e-3 and read and same))
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
