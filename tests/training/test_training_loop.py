"""The samples of a step."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from weightops.training.training_loop import batch_indices


def test_every_image_once_an_epoch() -> None:
    epochs = np.concatenate([batch_indices(10, 4, step, 0) for step in range(5)]).reshape(2, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_an_order_is_drawn_once_an_epoch() -> None:
    batch_indices(3_000_000, 64, 0, seed=9)
    started = perf_counter()
    batches = [batch_indices(3_000_000, 64, step, seed=9) for step in range(20)]
    assert perf_counter() - started < 0.1  # a permutation of this size takes longer than that
    order = np.random.default_rng([9, 0]).permutation(3_000_000)
    assert np.array_equal(np.concatenate(batches), order[: 20 * 64])
