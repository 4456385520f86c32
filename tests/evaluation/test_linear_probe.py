"""The linear probe, against plain formulas and scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from weightops import ImageModel, evaluate
from weightops.errors import OptionError, TaskError
from weightops.evaluation.linear_probe import fit_logistic_regression, linear_probe
from weightops.tasks.table import find_task


def test_the_regression_minimises_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 7, generator=generator), torch.randint(3, (200,), generator=generator)
    weights = fit_logistic_regression(x.double(), y, 3, 0.1).numpy()
    single = fit_logistic_regression(x, y, 3, 0.1).double().numpy()
    features, labels = x.double().numpy(), y.numpy()

    def gradient(w: np.ndarray) -> np.ndarray:
        z = features @ w[:-1] + w[-1]
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(200), labels] -= 1
        return np.vstack([features.T @ p / 200 + 0.1 * w[:-1], p.mean(0, keepdims=True)])

    # The loss is convex, so that a zero gradient means the minimum.
    assert np.abs(gradient(weights)).max() < 2e-6
    assert np.abs(gradient(single)).max() < 2e-4
    sklearn = pytest.importorskip("sklearn.linear_model")
    other = sklearn.LogisticRegression(C=1 / (0.1 * 200), max_iter=1000, tol=1e-8)
    expected = other.fit(features, labels).coef_.T
    assert np.allclose(expected, weights[:-1] - weights[:-1].mean(1, keepdims=True), atol=1e-4)


def test_linear_probe() -> None:
    model = ImageModel.open("embedded", "cpu")
    scores = evaluate(model, "digits", evaluator="linear_probe")["digits"]
    zero_shot = evaluate(model, "digits")["digits"]["acc1"]  # 48 %
    assert scores["lp_acc1"] > zero_shot + 0.2
    assert scores["n"] == 500
    assert scores["lp_decay"] in {10.0**-i for i in range(7)}
    assert scores["lp_acc5"] > 0.95
    task = find_task("digits")
    assert linear_probe(model, task, "test") == scores
    with torch.inference_mode():
        assert linear_probe(model, task, "test") == scores
    with pytest.raises(OptionError, match="fitted on the training images"):
        linear_probe(model, task, "train")
    with pytest.raises(TaskError, match="none of its 0 classes"):
        linear_probe(model, replace(task, classes=()), "test")
