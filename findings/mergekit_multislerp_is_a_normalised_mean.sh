#!/bin/sh
# mergekit==0.1.5, transformers==5.24.0, torch==2.13.0, CPU. A multislerp merge of two models of equal norm, whose
# matrices stand at right angles, with weights 0.75 and 0.25; and of three with weights 0.6, 0.3 and 0.1.
# Expected: of two models what slerp gives, a quarter of the way along the arc, 22.5 degrees, as with mergekit's
# nuslerp; of three the weighted mean on the sphere.
# Seen: 18.43 degrees, the arc tangent of 1/3; of three 4.14 degrees beside the mean on the sphere. Both are, to
# rounding, the linear mean of the unit vectors, scaled to their norm. The step in the tangent space does nothing:
# there the vectors are projections, not logarithms (none is scaled to its angle), and around their linear mean the
# projections' weighted sum is zero. No warning. Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mergekit==0.1.5 torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import copy
import subprocess
import sys

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

program, root = sys.argv[1:]
torch.manual_seed(0)
sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
name = "model.layers.0.mlp.down_proj.weight"
# Three matrices at right angles to each other, of norm 1.
units = torch.linalg.qr(torch.randn(32 * 32, 3, dtype=torch.float64)).Q.T
for place, unit in enumerate(units):
    model = copy.deepcopy(base)
    model.get_parameter(name).data = unit.reshape(32, 32).float()
    model.save_pretrained(f"{root}/{place}")


def merged(method, weights):
    with open(f"{root}/recipe.yml", "w") as file:
        file.write(f"merge_method: {method}\ndtype: float32\nmodels:\n")
        for place, weight in enumerate(weights):
            file.write(f"- model: {root}/{place}\n  parameters:\n    weight: {weight}\n")
    command = [program, f"{root}/recipe.yml", f"{root}/merged", "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)
    return load_file(f"{root}/merged/model.safetensors")[name].flatten().double()


def degrees(one, other):
    return float(torch.rad2deg(torch.acos((one @ other) / one.norm() / other.norm())))


def on_the_line(weights):
    """The linear mean of the unit vectors, of norm 1."""
    mean = torch.tensor(weights, dtype=torch.float64) @ units[: len(weights)]
    return mean / mean.norm()


def on_the_sphere(weights):
    """The point where the weighted logarithms sum to zero."""
    weights, points = torch.tensor(weights, dtype=torch.float64), units[: len(weights)]
    mean = points.mean(0) / points.mean(0).norm()
    for _ in range(200):
        dots = points @ mean
        angles = torch.acos(dots)
        step = (weights * angles / torch.sin(angles)) @ (points - dots[:, None] * mean)
        mean = mean + 0.5 * step
        mean = mean / mean.norm()
    assert step.norm() < 1e-9
    return mean


two, three = [0.75, 0.25], [0.6, 0.3, 0.1]
multi, nu = degrees(merged("multislerp", two), units[0]), degrees(merged("nuslerp", two), units[0])
print(f"two models, from the first: nuslerp {nu:.2f} degrees, multislerp {multi:.2f}")
theirs = merged("multislerp", three)
line = float((theirs - on_the_line(three)).norm())
sphere = degrees(theirs, on_the_sphere(three))
print(f"three models: {line:.1e} from the normalised linear mean, {sphere:.2f} degrees from the mean on the sphere")
right = abs(degrees(on_the_sphere(two), units[0]) - 22.5) < 0.01 and abs(nu - 22.5) < 0.01
sys.exit(not (right and abs(multi - 18.43) < 0.01 and line < 1e-5 and sphere > 2))
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder/venv/bin/mergekit-yaml" "$folder"
