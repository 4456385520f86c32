#!/bin/sh
# torch==2.13.0, CPU. The derivative of nn.MultiheadAttention's or nn.TransformerEncoderLayer's outputs along a task
# vector, by torch.func.jvp, as linearised (tangent) models need it; inside sdpa_kernel(SDPBackend.MATH), which has a
# forward derivative.
# Expected: the same in eval mode as in training mode without dropout.
# Seen: training mode gives it; eval mode raises NotImplementedError, as fused kernels step in there, which sdpa_kernel
# doesn't rule and which have no forward derivative. torch.backends.mha.set_fastpath_enabled(False) helps.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import torch
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
x = torch.randn(2, 3, 16)
modules = {
    "attention": (torch.nn.MultiheadAttention(16, 2, batch_first=True), (x, x, x)),
    "layer": (torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), (x,)),
}


def derivative(module, inputs):
    start = {name: p.detach() for name, p in module.named_parameters()}
    torch.manual_seed(1)
    step = {name: torch.randn_like(p) for name, p in start.items()}

    def outputs(weights):
        result = functional_call(module, weights, inputs)
        return result[0] if isinstance(result, tuple) else result

    with sdpa_kernel(SDPBackend.MATH):
        return jvp(outputs, (start,), (step,))[1]


as_said = []
for name, (module, inputs) in modules.items():
    trained = derivative(module.train(), inputs)
    try:
        derivative(module.eval(), inputs)
        as_said.append(False)
    except NotImplementedError as error:
        print(name, "in eval mode:", str(error).split(". ")[0][:90])
    torch.backends.mha.set_fastpath_enabled(False)
    as_said.append(torch.allclose(derivative(module.eval(), inputs), trained, atol=1e-5))
    torch.backends.mha.set_fastpath_enabled(True)
print("in training mode, and without the fast path in eval mode, it is there and the same:", as_said)
sys.exit(as_said != [True, True])
PY
"$folder/venv/bin/python" "$folder/try.py"
