#!/bin/sh
# torch==2.13.0, CPU. torch.optim.swa_utils.AveragedModel of a bfloat16 model: the plain mean of its 2,000 states, 1,000
# at 1 and 1,000 at 2; and the moving average with decay 0.999 while the weights stay at 1.5 for 5,000 steps.
# Expected: about 1.5 in both, as for float32: within bfloat16's precision, since an average is accumulated in at least
# float32, as torch.mean of bfloat16 is; or a warning.
# Seen: 1.0 in both, to the bit. The average is kept in the model's own dtype, and a step of 1/1000 of the way rounds
# back to where it was: the mean of a run is its first states, the moving average is the start. No error, no warning.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averages(dtype):
    """Return the mean of 1,000 states at 1 and 1,000 at 2, and a moving average from 1 to 1.5."""
    model = torch.nn.Linear(4, 4, bias=False).to(dtype)
    mean, moving = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    for step in range(2000):
        model.weight.data.fill_(1.0 if step < 1000 else 2.0)
        mean.update_parameters(model)
    model.weight.data.fill_(1.0)
    moving.update_parameters(model)
    model.weight.data.fill_(1.5)
    for _ in range(5000):
        moving.update_parameters(model)
    return [round(float(each.module.weight.detach()[0, 0]), 3) for each in (mean, moving)]


single, half = averages(torch.float32), averages(torch.bfloat16)
states = torch.tensor([1.0, 2.0], dtype=torch.bfloat16).repeat_interleave(1000)
print("float32:", single, "bfloat16:", half, "torch.mean of the bfloat16 states:", float(states.mean()))
sys.exit(half != [1.0, 1.0] or single[0] != 1.5 or abs(single[1] - 1.5) > 0.01)
PY
"$folder/venv/bin/python" "$folder/try.py"
