#!/bin/sh
# diffusers==0.42.1, peft==0.21.2, torch==2.13.0, CPU. A LoRA of rank 4 and alpha 2 on a UNet, converted by
# diffusers.utils.convert_state_dict_to_kohya for the programs that read Kohya's files.
# Expected: up @ down * alpha / rank of the converted file is the delta that was trained; or alpha is asked for.
# Seen: every `.alpha` is the rank, whatever was trained, so the delta comes out twice as large. There is no argument to
# give alpha. save_lora_adapter and load_lora_adapter keep it.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q diffusers==0.42.1 peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import peft
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya

seen = {}
for alpha in (2, 4):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    unet.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q"], init_lora_weights=False)
    )
    state = {f"unet.{name}": value for name, value in peft.get_peft_model_state_dict(unet).items()}
    kohya = convert_state_dict_to_kohya(state)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    trained = unet.get_submodule(name).get_delta_weight("default").detach()
    up, down, written = (
        kohya[f"lora_unet_{name.replace('.', '_')}.{part}"]
        for part in ("lora_up.weight", "lora_down.weight", "alpha")
    )
    delta = (up @ down * written / len(down)).detach()
    seen[alpha] = float(written), float((delta * trained).sum() / trained.square().sum())
    print(f"alpha {alpha}: written {seen[alpha][0]:.0f}, delta of {seen[alpha][1]:.3f} times the trained one")
sys.exit(not (seen[2][0] == seen[4][0] == 4 and abs(seen[2][1] - 2) < 1e-4 and abs(seen[4][1] - 1) < 1e-4))
PY
"$folder/venv/bin/python" "$folder/try.py"
