#!/bin/sh
# peft==0.21.2, torch==2.13.0, CPU. OFT on an nn.Conv2d with a 3 x 3 kernel, fresh: its rotation is the identity.
# Expected: the model computes what it did before, as with OFT on a Linear or a 1 x 1 kernel, and as it does merged.
# Seen: the running model's outputs are off by more than their own size, the merged model's are right. The inputs are
# cut into overlapping patches, rotated and added up again, so that a pixel inside counts nine times, one in a corner
# once. What is trained so isn't what is merged.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import peft
import torch


class Net(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, size, padding=size // 2)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.conv(x)


off = {}
x = torch.ones(1, 4, 7, 7)
for size in (1, 3):
    torch.manual_seed(0)
    base = Net(size).eval()
    with torch.no_grad():
        before = base(x)
        config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["conv"])
        model = peft.get_peft_model(base, config).eval()
        running = model(x)
        inputs = model.base_model.model.conv.oft_R["default"](x)
        merged = model.merge_and_unload()(x)
    for name, after in (("running", running), ("merged", merged)):
        off[size, name] = float((after - before).norm() / before.norm())
        print(f"{size} x {size}, {name}: off by {off[size, name]:.2f} of the outputs")
    print("ones, as the layer gets them:", inputs[0, 0, 3].tolist())
right = all(off[key] < 1e-5 for key in ((1, "running"), (1, "merged"), (3, "merged")))
sys.exit(not (right and off[3, "running"] > 1))
PY
"$folder/venv/bin/python" "$folder/try.py"
