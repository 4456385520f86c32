#!/bin/sh
# loralib==0.1.2, torch==2.13.0, CPU. A trained network with loralib layers; its whole state_dict() is loaded into
# another instance of the network, with strict=True.
# Expected: the copy computes what the original computes, whichever of train() and eval() either is in, as with every
# layer of torch: there the mode changes no weight.
# Seen: eval() adds the delta to the weight and train() takes it away again, but that this was done is no part of the
# state. Saved in eval mode (after a validation, say) and loaded into a fresh network: W + 2 delta, in both modes. Saved
# in train mode and loaded into a network in eval mode: W, the delta does nothing, and train() then leaves W - delta in
# the weight. No error, no warning; only equal modes are right.
# Known upstream (microsoft/LoRA 190). Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q loralib==0.1.2 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import loralib
import torch

kinds = {
    "Linear": (lambda: loralib.Linear(6, 5, r=2), lambda layer: layer.weight),
    "Embedding": (lambda: loralib.Embedding(7, 5, r=2), lambda layer: layer.weight),
    "Conv2d": (lambda: loralib.Conv2d(3, 4, kernel_size=3, r=2), lambda layer: layer.conv.weight),
}
want = {("train", "train"): (1, 0), ("eval", "train"): (2, 1), ("train", "eval"): (0, -1), ("eval", "eval"): (1, 0)}
as_said = []
for kind, (make, weight_of) in kinds.items():
    torch.manual_seed(0)
    trained = torch.nn.Sequential(make())
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    base = weight_of(trained[0]).detach().clone()
    trained.eval()
    delta = weight_of(trained[0]).detach() - base
    for saved, loaded in want:
        trained.train(saved == "train")
        copy = torch.nn.Sequential(make())
        copy.train(loaded == "train")
        copy.load_state_dict(trained.state_dict(), strict=True)
        times = []
        for mode in (False, True):  # merged, as the network computes in eval mode; then without the delta
            copy.train(mode)
            change = weight_of(copy[0]).detach() - base
            times.append(round(float((change * delta).sum() / delta.square().sum()), 3))
        what = f"merged W + {times[0]} delta, unmerged W + {times[1]} delta"
        print(f"{kind}, saved in {saved} mode, loaded in {loaded} mode: {what}")
        as_said.append(tuple(times) == want[saved, loaded])
sys.exit(not all(as_said))
PY
"$folder/venv/bin/python" "$folder/try.py"
