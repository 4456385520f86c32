#!/bin/sh
# lightning==2.6.6, torch==2.13.0, CPU. EMAWeightAveraging(update_starting_at_step=100), so that the average holds no
# early states, in a run that ends after 12 steps, as a trial on a small set or one with early stopping does. The
# model's one weight starts at 0 and grows by 1 each step.
# Expected: as long as nothing was averaged, the trained weights are validated, saved and left in the model; or a
# warning.
# Seen: the copy of the model that was made before the first step takes the average's place. Each validation sees 0,
# the checkpoint's state_dict holds 0, and after fit() the model's weight is 0: the run is undone. Only the checkpoint
# still has the trained weights, under current_model_state. No error, no warning.
# Known upstream for validation (Lightning-AI/pytorch-lightning 21724). Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lightning==2.6.6 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
import logging
import sys
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

warnings.filterwarnings("ignore")  # of few workers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Steps(lightning.LightningModule):
    """One weight that grows by 1 each step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.validated = []

    def training_step(self, batch, number):
        return -self.weight.sum()

    def validation_step(self, batch, number):
        self.validated.append(float(self.weight.detach()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trained(folder, *callbacks):
    """Return the weight in validations, in the checkpoint (both places) and in the model after the run."""
    model, save = Steps(), ModelCheckpoint(folder, filename="last")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[*callbacks, save], accelerator="cpu", num_sanity_val_steps=0, **quiet
    )
    data = torch.zeros(4, 1)
    trainer.fit(model, torch.utils.data.DataLoader(data), torch.utils.data.DataLoader(data[:1]))
    saved = torch.load(save.best_model_path, weights_only=False)
    current = saved.get("current_model_state", saved["state_dict"])
    weights = [float(each["weight"]) for each in (saved["state_dict"], current)]
    return model.validated, *weights, float(model.weight.detach())


plain = trained(f"{sys.argv[1]}/plain")
late = trained(f"{sys.argv[1]}/late", EMAWeightAveraging(decay=0.9, update_starting_at_step=100))
for name, found in (("no averaging", plain), ("averaging from step 100", late)):
    print("{}: validated {}, state_dict {}, current_model_state {}, left in the model {}".format(name, *found))
right = plain == ([4.0, 8.0, 12.0], 12.0, 12.0, 12.0)
sys.exit(not (right and late == ([0.0, 0.0, 0.0], 0.0, 12.0, 0.0)))
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
