#!/bin/sh
# timm==1.0.31, torch==2.14.1, CPU. ModelEmaV3 (so ModelEmaV2 and ModelEma) with decay 0.9 of a model whose head shares
# its weight with its embedding. All weights go from 0 to 1, then update(model) once.
# Expected: every weight of the average is 0.1, as with torch's AveragedModel.
# Seen: the shared weight is 0.19, the others are 0.1: the state_dict lists it under two names, and its average is moved
# once for each, so its decay is 0.81, the square of the one asked for: it looks back half as many steps as the rest of
# the model. No warning. ModelEmaV3 with exclude_buffers=True, which goes through parameters(), is right.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31 torch==2.14.1 torchvision==0.29.1 numpy
cat > "$folder/try.py" <<'PY'
import sys

import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Tied(torch.nn.Module):
    """An embedding, a layer, and a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 4)
        self.layer = torch.nn.Linear(4, 4, bias=False)
        self.head = torch.nn.Linear(4, 4, bias=False)
        self.head.weight = self.embedding.weight


def moved(make, update):
    """Return how far the own and the shared weight of the average have moved in one step from 0 to 1."""
    model = Tied()
    for parameter in model.parameters():
        parameter.data.zero_()
    ema = make(model)
    update(ema, model)  # AveragedModel copies at its first update; elsewhere the weights are equal
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    update(ema, model)
    average = ema.ema if isinstance(ema, ModelEma) else ema.module
    assert average.head.weight is average.embedding.weight
    return [round(float(layer.weight.detach()[0, 0]), 4) for layer in (average.layer, average.head)]


found = {}
for name, make in (
    ("ModelEma", lambda model: ModelEma(model, decay=0.9)),
    ("ModelEmaV2", lambda model: ModelEmaV2(model, decay=0.9)),
    ("ModelEmaV3", lambda model: ModelEmaV3(model, decay=0.9)),
    ("ModelEmaV3, foreach=False", lambda model: ModelEmaV3(model, decay=0.9, foreach=False)),
    ("ModelEmaV3, exclude_buffers=True", lambda model: ModelEmaV3(model, decay=0.9, exclude_buffers=True)),
):
    found[name] = moved(make, lambda ema, model: ema.update(model))
torchs = moved(
    lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    lambda ema, model: ema.update_parameters(model),
)
for name, (own, shared) in (*found.items(), ("AveragedModel", torchs)):
    print(f"{name}: own weight {own}, shared weight {shared}")
right = found.pop("ModelEmaV3, exclude_buffers=True") == torchs == [0.1, 0.1]
sys.exit(not (right and all(pair == [0.1, 0.19] for pair in found.values())))
PY
"$folder/venv/bin/python" "$folder/try.py"
