"""Soups: greedy and uniform."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightops import TaskVector, average, open_checkpoint, soup
from weightops.errors import UnknownNameError


def test_a_greedy_soup_takes_what_helps(own: Path, tmp_path: Path) -> None:
    base = open_checkpoint(own / "model")
    good = TaskVector.load(own / "swapped.safetensors").apply(base).save(tmp_path / "good")
    bad = TaskVector.load(own / "turned.safetensors").apply(base, -2.0).save(tmp_path / "bad")
    models, tasks = [own / "model", good, bad], [str(own / "swapped")]
    result = soup(models, tmp_path / "soup", tasks=tasks, device="cpu")
    assert result["steps"][0]["model"] == "good"
    accepted = [step["model"] for step in result["steps"] if step["accepted"]]
    assert "bad" not in accepted
    assert all(step["why"] for step in result["steps"])
    alone = [step["accuracy"] for step in result["steps"]]
    assert alone == sorted(alone, reverse=True)


def test_a_uniform_soup_is_the_average(own: Path, tmp_path: Path) -> None:
    base = open_checkpoint(own / "model")
    other = TaskVector.load(own / "swapped.safetensors").apply(base).save(tmp_path / "other")
    models, tasks = [own / "model", other], [str(own / "swapped")]
    result = soup(models, tmp_path / "soup", tasks=tasks, recipe="uniform", device="cpu")
    assert result["alpha"] == {"model": 0.5, "other": 0.5}
    assert result["options"] == {"recipe": "uniform"}
    assert "recipe=uniform" in (tmp_path / "soup/README.md").read_text(encoding="utf-8")
    expected = average(models).state_dict()
    written = open_checkpoint(tmp_path / "soup").state_dict()
    assert all(torch.allclose(t, expected[name], atol=1e-6) for name, t in written.items())


def test_weights_without_a_configuration_take_the_bases(own: Path, tmp_path: Path) -> None:
    model = open_checkpoint(own / "model")
    weights = open_checkpoint(model.state_dict()).save(tmp_path / "weights.safetensors")
    tasks = [str(own / "swapped")]
    soup([weights, own / "model"], tmp_path / "soup", tasks=tasks, base=own / "model", device="cpu")
    assert open_checkpoint(tmp_path / "soup").architecture is not None


def test_refusals(own: Path) -> None:
    with pytest.raises(UnknownNameError, match="no recipe 'x'"):
        soup([own / "model", own / "model"], own / "x", recipe="x")
