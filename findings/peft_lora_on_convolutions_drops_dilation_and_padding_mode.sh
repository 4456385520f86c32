#!/bin/sh
# peft==0.21.2, torch==2.13.0, CPU. LoRA on an nn.Conv2d with dilation=2, padding="same" (segmentation), or with
# padding_mode="circular" (textures, panoramas).
# Expected: the adapter's convolutions see the pixels that the layer's own kernel sees; what is merged computes what was
# trained.
# Seen: lora_A takes over kernel size, stride and padding, but neither dilation nor padding mode: while training, the
# delta is a dense kernel on zero padding. merge_and_unload adds it to the dilated or circular kernel: other outputs,
# without a warning. A layer without either is right. LoHa is right under dilation, as it takes the layer's settings.
# Known upstream (huggingface/peft 3697). Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import peft
import torch


class Net(torch.nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 3, padding="same", **settings)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.conv(x)


def off(config, **settings):
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(settings), config).eval()
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        trained = model(x)
        delta = trained - model.base_model.model.conv.base_layer(x)
        return float((model.merge_and_unload()(x) - trained).norm() / delta.norm())


lora = peft.LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)
loha = peft.LoHaConfig(r=2, target_modules=["conv"], init_weights=False)
seen = {
    "LoRA, plain": off(lora),
    "LoRA, dilated": off(lora, dilation=2),
    "LoRA, circular": off(lora, padding_mode="circular"),
    "LoHa, dilated": off(loha, dilation=2),
}
for name, value in seen.items():
    print(f"{name}: merged outputs off by {value:.2f} of the adapter's effect")
wrong = [value > 0.1 for value in seen.values()]
sys.exit(wrong != [False, True, True, False])
PY
"$folder/venv/bin/python" "$folder/try.py"
