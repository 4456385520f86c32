"""Soups: greedy and uniform."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightops import TaskVector, average, evaluate, open_checkpoint, soup, verify
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


@pytest.mark.parametrize("best_at", [0, 1, 2])
def test_a_soup_is_compared_with_the_best_single_model(
    own: Path, tmp_path: Path, best_at: int
) -> None:
    """A soup that is one of its inputs gains nothing, whichever was named first."""
    base = open_checkpoint(own / "model")
    good = TaskVector.load(own / "swapped.safetensors").apply(base).save(tmp_path / "good")
    bad = TaskVector.load(own / "turned.safetensors").apply(base, -2.0).save(tmp_path / "bad")
    worse = TaskVector.load(own / "turned.safetensors").apply(base, -4.0).save(tmp_path / "worse")
    models = [bad, worse]
    models.insert(best_at, good)
    out = tmp_path / "soup"
    result = soup(models, out, tasks=[str(own / "swapped")], base=own / "model", device="cpu")
    assert (result["best_single"], result["compared_with"]) == ("good", "best single")
    assert result["alpha"] == {"good": 1.0, "bad": 0.0, "worse": 0.0}
    [task], [intervals] = result["tasks"].values(), result["intervals"].values()
    assert task["soup"] == task["best single"]
    assert intervals["change"] == (0.0, 0.0)
    own_score = evaluate(base, str(own / "swapped"), device="cpu", precision="float32")
    assert task["base"]["acc1"] == next(iter(own_score.values()))["acc1"]
    gain = task["soup"]["acc1"] - task["base"]["acc1"]
    low, high = intervals["change_from_base"]
    assert (low + high) / 2 == pytest.approx(gain)
    shown = f"{100 * task['soup']['acc1']:.1f}"
    title = f"{shown} → {shown} %, best single → soup (test)"
    assert title in (out / "report.html").read_text(encoding="utf-8")
    assert verify(out).holds
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# 3 models, soup: swapped" in card
    assert all(f"{name}" in card for name in ("good", "bad", "worse"))
    without = soup(models, tmp_path / "other", tasks=[str(own / "swapped")], device="cpu")
    assert all("base" not in task for task in without["tasks"].values())


def test_weights_without_a_configuration_take_the_bases(own: Path, tmp_path: Path) -> None:
    model = open_checkpoint(own / "model")
    weights = open_checkpoint(model.state_dict()).save(tmp_path / "weights.safetensors")
    tasks = [str(own / "swapped")]
    soup([weights, own / "model"], tmp_path / "soup", tasks=tasks, base=own / "model", device="cpu")
    assert open_checkpoint(tmp_path / "soup").architecture is not None


def test_refusals(own: Path) -> None:
    with pytest.raises(UnknownNameError, match="no recipe 'x'"):
        soup([own / "model", own / "model"], own / "x", recipe="x")
