"""The recipe of a fine-tuning run: its defaults, a model's own values, and ranges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from weightops import TrainingConfig, open_checkpoint
from weightops.errors import OptionError
from weightops.training.config import config_for


def test_the_papers_recipe() -> None:
    config = TrainingConfig()
    assert (config.steps, config.batch_size, config.lr) == (2000, 128, 1e-5)
    assert (config.weight_decay, config.warmup, config.max_grad_norm) == (0.1, 200, 1.0)
    assert config_for({"w": torch.zeros(1)}) == config


def test_learning_rate() -> None:
    config = TrainingConfig()
    assert config.learning_rate(0) == pytest.approx(1e-5 / 200)
    assert config.learning_rate(199) == pytest.approx(1e-5)
    assert config.learning_rate(1100) == pytest.approx(0.5e-5)
    last = 0.5e-5 * (1 + math.cos(math.pi * 1799 / 1800))
    assert config.learning_rate(1999) == pytest.approx(last)
    short = TrainingConfig(steps=50)
    assert short.learning_rate(4) == pytest.approx(1e-5)
    assert short.learning_rate(49) < 1e-7


def test_a_model_s_own_recipe() -> None:
    own = config_for("embedded", lr=None)
    assert own != TrainingConfig()
    assert config_for(open_checkpoint("embedded"), steps=5) == replace(own, steps=5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps is 0, and must be an integer at least 1"),
        ("steps", 1.5, "steps is 1.5, and must be an integer"),
        ("batch_size", 0, "batch_size is 0"),
        ("lr", 0.0, "lr is 0.0, and must be a number greater than 0"),
        ("lr", math.nan, "lr is nan"),
        ("lr", "1e-3", "lr is '1e-3'"),
        ("weight_decay", -0.1, "weight_decay is -0.1"),
        ("warmup", -1, "warmup is -1"),
        ("max_grad_norm", 0.0, "max_grad_norm is 0.0"),
        ("shift", 1.0, "shift is 1.0, and must be a number at least 0 and less than 1"),
        ("ema", 1.0, "ema is 1.0"),
        ("seed", -1, "seed is -1"),
    ],
)
def test_values_outside_of_their_range(name: str, value: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainingConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=message):
        config_for({"w": torch.zeros(1)}, **{name: value})  # type: ignore[arg-type]
