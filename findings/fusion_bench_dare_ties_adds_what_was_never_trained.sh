#!/bin/sh
# fusion_bench==0.2.33, torch==2.13.0, CPU. DareTiesMerging of two copies of the base, scaling_factor 0.3, for a network
# with batch normalisation (as a ResNet has it) whose last layer was frozen in fine-tuning.
# Expected: all task vectors are zero, so the result is the base, as with TiesMergingAlgorithm and DareTaskArithmetic.
# Seen: the base is subtracted only from parameters that require a gradient, and what isn't subtracted counts as a task
# vector as it is. Running means and variances, which are no parameters, come out 1.6 times as large (1 + 0.3 per
# model), frozen weights likewise, but for what DARE drops and rescales: 1.69 times here. No error, no warning.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fusion_bench==0.2.33 torch==2.13.0 transformers==5.24.0
cat > "$folder/try.py" <<'PY'
import copy
import sys

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.dare.task_arithmetic import DareTaskArithmetic
from fusion_bench.method.dare.ties_merging import DareTiesMerging
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm

torch.manual_seed(0)
nn = torch.nn
base = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
for _ in range(20):
    base(1 + 2 * torch.randn(64, 8))
base.eval()
base[3].requires_grad_(False)
dare = {"sparsity_ratio": 0.5, "only_on_linear_weights": False, "rescale": True, "scaling_factor": 0.3}
ties = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
methods = {
    "TIES": TiesMergingAlgorithm(**ties),
    "DARE": DareTaskArithmetic(**dare),
    "DARE-TIES": DareTiesMerging(**dare | ties),
}


def run(method, *tuned):
    models = {f"model{i}": copy.deepcopy(model) for i, model in enumerate(tuned)}
    return method.run(BaseModelPool({"_pretrained_": copy.deepcopy(base), **models}))


def changed(model):
    """Return by how much the tensors that aren't the base's were multiplied."""
    old, times = base.state_dict(), {}
    for name, value in model.state_dict().items():
        if not torch.allclose(value, old[name], atol=1e-6):
            times[name] = round(float((value * old[name]).sum() / old[name].square().sum()), 3)
    return times


found = {name: changed(run(method, base, base)) for name, method in methods.items()}
for name, times in found.items():
    print(f"{name} of two copies of the base: {times}")
times = found["DARE-TIES"]
averages = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
frozen = ["3.weight", "3.bias"]
as_said = sorted(times) == sorted(averages + frozen) and found["TIES"] == found["DARE"] == {}
as_said = as_said and all(abs(times[name] - 1.6) < 0.01 for name in averages)
sys.exit(not (as_said and all(times[name] > 1.2 for name in frozen)))
PY
"$folder/venv/bin/python" "$folder/try.py"
