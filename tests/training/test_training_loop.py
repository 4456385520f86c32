"""The samples of a step."""

from __future__ import annotations

import numpy as np

from weightops.training.training_loop import batch_indices


def test_every_image_once_an_epoch() -> None:
    epochs = np.concatenate([batch_indices(10, 4, step, 0) for step in range(5)]).reshape(2, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()
