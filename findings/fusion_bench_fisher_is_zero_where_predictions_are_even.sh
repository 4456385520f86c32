#!/bin/sh
# fusion_bench==0.2.33, torch==2.13.0, CPU. FisherMergingForCLIPVisionModel.get_fisher_weights, whose numbers weigh the
# parameters in Fisher merging, for a linear classifier of 4 classes and 8 images.
# Expected: the mean over images of sum_y p(y|x) (d log p(y|x) / d weight)^2, for any batch size.
# Seen: the square of the gradient of sum_y sqrt(p(y|x)) log p(y|x), summed over the batch. Norms: where a model gives
# all classes the same probability 0.0000, exact 1.6348; for another model 0.2226, 0.2520 and 0.2734 in batches of 1, 4
# and 8 images, exact 0.7813. So parameters of an undecided model weigh nothing beside the floor. No warning.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fusion_bench==0.2.33 torch==2.13.0 transformers==5.24.0
cat > "$folder/try.py" <<'PY'
import sys

import torch
from fusion_bench.method.fisher_merging.clip_fisher_merging import FisherMergingForCLIPVisionModel

torch.manual_seed(0)


class OfPixels(FisherMergingForCLIPVisionModel):
    """The algorithm for a classifier whose logits are the module's own."""

    def compute_logits(self, module, batch, task):
        return module(batch[0].flatten(1))


def theirs(model, pixels, size):
    algorithm = OfPixels(
        exclude_param_names_regex=[],
        normalize_fisher_weight=True,
        minimal_fisher_weight=1e-6,
        num_fisher_examples=len(pixels),
        dataloader_kwargs={"batch_size": size, "num_workers": 0},
    )
    algorithm._clip_processor = lambda image: image
    data = [(image, 0) for image in pixels]
    return algorithm.get_fisher_weights("task", model, data, ["weight"])["weight"]


def expected(model, pixels):
    """The mean over images of sum_y p(y|x) (d log p(y|x) / d weight)^2."""
    total = torch.zeros_like(model.weight)
    for image in pixels.flatten(1):
        logs = model(image).log_softmax(-1)
        for log in logs:
            (grad,) = torch.autograd.grad(log, model.weight, retain_graph=True)
            total += log.detach().exp() * grad.square()
    return total / len(pixels)


pixels = torch.randn(8, 3, 2, 2)
certain, undecided = torch.nn.Linear(12, 4), torch.nn.Linear(12, 4)
with torch.no_grad():
    certain.weight.mul_(5)
    undecided.weight.zero_()
    undecided.bias.zero_()
norms = {}
for name, model in (("undecided", undecided), ("certain", certain)):
    exact = float(expected(model, pixels).norm())
    norms[name] = [float(theirs(model, pixels, size).norm()) for size in (1, 4, 8)]
    print(f"{name}: exact {exact:.4f}, seen {norms[name]} in batches of 1, 4 and 8")
zero = max(norms["undecided"]) < 1e-9
less = max(norms["certain"]) < 0.5 * exact and norms["certain"][0] < 0.9 * norms["certain"][2]
sys.exit(not (zero and less))
PY
"$folder/venv/bin/python" "$folder/try.py"
