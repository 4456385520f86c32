#!/bin/sh
# mergekit==0.1.5, transformers==5.24.0, torch==2.13.0, CPU. nuslerp with nuslerp_flatten: false, of two models whose
# matrix has rows of norm 1 that stand at right angles to the other model's, with equal weights.
# Expected: with nuslerp_row_wise: true, rows of norm 1, halfway along the arc: its documentation says that row vectors
# are interpolated instead of column vectors.
# Seen: that is what comes without it. With nuslerp_row_wise: true the columns are interpolated (the vectors along the
# first dimension, over the outputs), and rows have norms from 0.95 to 1.05. So the default is the one by rows, that
# is, by what a neuron takes; who asks for rows gets columns. No warning. Exits 1 if the behaviour has changed.
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
sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
name = "model.layers.0.mlp.down_proj.weight"
pairs = [torch.linalg.qr(torch.randn(32, 2)).Q.T for _ in range(16)]
given = [torch.stack(rows) for rows in zip(*pairs)]
for place, matrix in enumerate(given):
    own = copy.deepcopy(model)
    own.get_parameter(name).data = matrix.clone()
    own.save_pretrained(f"{root}/{place}")


def merged(row_wise):
    with open(f"{root}/recipe.yml", "w") as file:
        file.write("merge_method: nuslerp\ndtype: float32\nmodels:\n")
        for place in range(2):
            file.write(f"- model: {root}/{place}\n  parameters:\n    weight: 1\n")
        file.write(f"parameters:\n  nuslerp_flatten: false\n  nuslerp_row_wise: {row_wise}\n")
    command = [program, f"{root}/recipe.yml", f"{root}/merged", "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)
    return load_file(f"{root}/merged/model.safetensors")[name]


def halfway(one, other):
    """Halfway along the arcs between the rows of two matrices."""
    cosines = (one * other).sum(1) / one.norm(dim=1) / other.norm(dim=1)
    return (one + other) / (2 * torch.cos(torch.acos(cosines) / 2))[:, None]


rows, columns = halfway(*given), halfway(given[0].T, given[1].T).T
seen = {}
for row_wise in ("false", "true"):
    found = merged(row_wise)
    norms = found.norm(dim=1)
    by_rows, by_columns = (float((found - right).abs().max()) for right in (rows, columns))
    seen[row_wise] = (by_rows < 1e-5, by_columns < 1e-5)
    print(
        f"nuslerp_row_wise: {row_wise}: {by_rows:.2g} from the rows' arcs, {by_columns:.2g} from the columns', "
        f"norms of rows {norms.min():.2f} to {norms.max():.2f}"
    )
sys.exit(seen != {"false": (True, False), "true": (False, True)})
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder/venv/bin/mergekit-yaml" "$folder"
