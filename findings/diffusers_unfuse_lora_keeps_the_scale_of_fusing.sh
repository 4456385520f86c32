#!/bin/sh
# diffusers==0.42.1, peft==0.21.2, torch==2.13.0, CPU. unet.fuse_lora(lora_scale=0.5), then unet.unfuse_lora().
# Expected: the model is what it was before: the LoRA at its full strength, as set_adapters has set it, and fusing it
# again gives the same weights.
# Seen: fuse_lora multiplies the layers' scaling by lora_scale and nothing divides it again. After unfuse_lora the LoRA
# works at half strength, fused again at 0.5 it has a quarter, then an eighth. So a search over lora_scale that fuses,
# looks and unfuses measures products of the scales that it tried. set_adapters repairs it.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q diffusers==0.42.1 peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(8, 16),
    layers_per_block=1,
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=8,
    norm_num_groups=4,
    attention_head_dim=4,
)
name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
base = unet.get_submodule(name).weight.detach().clone()
unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]), "style")
for key, parameter in unet.named_parameters():
    if "lora_" in key:
        parameter.data = torch.randn(parameter.shape)
unet.set_adapters(["style"], [1.0])
layer = unet.get_submodule(name)
delta = layer.get_delta_weight("style").detach()


def strength():
    """Return how many times the LoRA's delta the fused weight is away from the base's."""
    return float(((layer.base_layer.weight - base) * delta).sum() / delta.square().sum())


fused = []
for _ in range(3):
    unet.fuse_lora(lora_scale=0.5)
    fused.append(round(strength(), 4))
    unet.unfuse_lora()
    print(f"fused at 0.5: {fused[-1]} times the delta; unfused, scaling {layer.scaling['style']}")
sys.exit(fused != [0.5, 0.25, 0.125])
PY
"$folder/venv/bin/python" "$folder/try.py"
