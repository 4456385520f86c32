#!/bin/sh
# lightning==2.6.6, torch==2.13.0, CPU. EMAWeightAveraging(decay=0.9, update_starting_at_epoch=2) for a model whose one
# weight grows by 1 each step, 4 steps an epoch, 3 epochs.
# Expected: no average of epochs 0 and 1; from epoch 2 (weights 9 to 12) on one step of the average per step, as with
# update_starting_at_step=8, which leaves 9.56 in the model.
# Seen: averaging begins at the first step of the run: after epoch 1 it has seen 8 states. What begins at the epoch is
# one more update at the end of each epoch, which counts its last state twice. In the model is 6.44 (5.82 without the
# argument), an average that still holds the start. No warning. update_starting_at_step is right.
# Exits 1 if the behaviour has changed.
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
from lightning.pytorch.callbacks import EMAWeightAveraging

warnings.filterwarnings("ignore")  # of few workers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Steps(lightning.LightningModule):
    """One weight that grows by 1 each step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, number):
        return -self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Counting(EMAWeightAveraging):
    """Keeps how many states the average has seen at the end of each epoch."""

    def on_train_epoch_end(self, trainer, module):
        super().on_train_epoch_end(trainer, module)
        self.counts = [*getattr(self, "counts", []), int(self._average_model.n_averaged)]


def trained(**settings):
    """Return the states averaged after each epoch, and the weight that the run leaves."""
    model, average = Steps(), Counting(decay=0.9, **settings)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[average], accelerator="cpu", enable_checkpointing=False, **quiet
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.zeros(4, 1)))
    found = average.counts, round(float(model.weight.detach()), 2)
    print(f"{settings}: states averaged after each epoch {found[0]}, weight at the end {found[1]}")
    return found


plain, epoch, step = trained(), trained(update_starting_at_epoch=2), trained(update_starting_at_step=8)
right = step == ([0, 0, 4], 9.56) and plain == ([4, 8, 12], 5.82)
sys.exit(not (right and epoch == ([4, 8, 13], 6.44)))
PY
"$folder/venv/bin/python" "$folder/try.py"
