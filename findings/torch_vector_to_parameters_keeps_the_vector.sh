#!/bin/sh
# torch==2.13.0, CPU. start = parameters_to_vector(model), then vector_to_parameters(start, model) to begin a
# fine-tuning from it, as one does to compute a task vector, end - start.
# Expected: the model gets the vector's values, in its own tensors and dtypes, as load_state_dict would give them.
# Seen: every parameter becomes a view of the vector. Training changes `start` in place, so the task vector is exactly
# zero; two models set from one vector are one model; a bfloat16 parameter is float32 afterwards, and torch.save of one
# bias writes the whole vector.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import io
import sys

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

torch.manual_seed(0)


def net():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    model[1].bfloat16()
    return model


start = parameters_to_vector(net().parameters()).detach()
untouched, model, other = start.clone(), net(), net()
print("second layer before:", model[1].weight.dtype)
vector_to_parameters(start, model.parameters())
vector_to_parameters(start, other.parameters())
dtype = model[1].weight.dtype
print("second layer after:", dtype)
file = io.BytesIO()
torch.save(model[1].bias.detach(), file)
size = file.getbuffer().nbytes
print(f"a bias of {64 * 4} bytes is saved in {size} bytes")
model(torch.randn(3, 64)).square().sum().backward()
torch.optim.SGD(model.parameters(), 1e-3).step()
end = parameters_to_vector(model.parameters()).detach()
true, task_vector = float((end - untouched).norm()), float((end - start).norm())
print(f"task vector: norm {task_vector}, by a copy of the start {true:.3f}")
one = torch.equal(other[0].weight, model[0].weight)
print("the other model was trained, too:", one)
sys.exit(not (task_vector == 0 and true > 0 and one and dtype == torch.float32 and size > 4 * 8000))
PY
"$folder/venv/bin/python" "$folder/try.py"
