"""Several models in one file, against formulas in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.merges import State, family
from safetensors.torch import load_file, save_file

from weightops import evaluate, open_checkpoint, pack
from weightops.algebra.names import Each
from weightops.algebra.scratch import Scratch
from weightops.cli.main import run
from weightops.errors import CheckpointError, MismatchError, OptionError, UnknownNameError

SHAPES = {"matrix": (6, 4), "vector": (33,), "one": (), "empty": (0,), "frozen": (5, 5)}


def three(dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    base, models = family(3, shapes=SHAPES, dtype=dtype)
    for model in models:
        model["frozen"] = base["frozen"]
    return base, dict(zip("abc", models, strict=True))


def changes(base: State, models: dict[str, State]) -> dict[str, np.ndarray]:
    return {
        name: np.stack([(m[name].double() - base[name].double()).numpy() for m in models.values()])
        for name in ("matrix", "vector", "one", "frozen")
    }


def test_elected_changes_and_scales(tmp_path: Path) -> None:
    base, models = three()
    file = pack(models, base, tmp_path / "p.safetensors")
    unified, masks, own, kept = {}, {}, np.zeros(3), np.zeros(3)
    for name, d in changes(base, models).items():
        sign = np.where(d.sum(0) > 0, 1, -1)
        masks[name] = d * sign > 0
        unified[name] = sign * (np.abs(d) * masks[name]).max(0)
        axes = tuple(range(1, d.ndim))
        own += np.abs(d).mean(axes)
        kept += np.abs(unified[name] * masks[name]).mean(axes)
    for i, task in enumerate(models):
        opened = open_checkpoint(f"{file}:{task}")
        assert opened.keys() == base.keys()
        for name in masks:
            change = own[i] / kept[i] * masks[name][i] * unified[name]
            expected = base[name].double().numpy() + change
            np.testing.assert_allclose(opened[name].double().numpy(), expected, atol=1e-6)
        assert torch.equal(opened["frozen"], base["frozen"])
        assert torch.equal(opened["ids"], base["ids"])
    stored = load_file(file)
    assert stored["masks/vector"].shape == (3, 5)
    assert "masks/frozen" not in stored


@pytest.mark.parametrize("scale", [0.4, Each((0.2, 0.5, 1.5))])
def test_masks_of_the_sum(tmp_path: Path, scale: Any) -> None:
    base, models = three()
    file = pack(models, base, tmp_path / "p.safetensors", method="tall", mask_scale=scale)
    scales = list(scale) if isinstance(scale, Each) else [scale] * 3
    for name, d in changes(base, models).items():
        total = d.sum(0)
        for i, task in enumerate(models):
            mask = np.abs(d[i]) >= scales[i] * np.abs(total - d[i])
            got = open_checkpoint(f"{file}:{task}")[name].double().numpy()
            np.testing.assert_allclose(got, base[name].double().numpy() + total * mask, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_part_of_a_tensor_in_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(41, 1001, generator=generator).to(dtype)}
    models = {
        task: {"w": (base["w"] + 0.1 * torch.randn(41, 1001, generator=generator)).to(dtype)}
        for task in "ab"
    }
    opened = open_checkpoint(f"{pack(models, base, tmp_path / 'p.safetensors')}:b")
    whole = opened["w"]
    assert whole.dtype == dtype
    elements = opened.source.open("w", Scratch())
    parts = [elements(start, min(start + 777, 41041)).clone() for start in range(0, 41041, 777)]
    assert torch.equal(torch.cat(parts).to(dtype), whole.flatten())
    saved = open_checkpoint(opened.save(tmp_path / "b.safetensors"))
    assert torch.equal(saved["w"], whole)


def test_one_model_is_itself_and_ties_stay(tmp_path: Path) -> None:
    def model(seed: int) -> State:
        shared = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        return {"head.weight": shared, "inside.weight": shared, "w": shared + 1}

    file = pack({"a": model(1)}, model(0), tmp_path / "p.safetensors")
    state = open_checkpoint(f"{file}:a").state_dict()
    assert state["head.weight"].data_ptr() == state["inside.weight"].data_ptr()
    assert all(torch.allclose(state[name], t, atol=1e-6) for name, t in model(1).items())
    assert "base/inside.weight" not in load_file(file)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = open_checkpoint("embedded")
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        state = {
            name: t + 0.01 * t.std() * torch.randn(t.shape, generator=generator)
            if name.startswith("visual.transformer") and t.dim() > 1
            else t
            for name, t in base.state_dict().items()
        }
        open_checkpoint(state).save(tmp_path / f"m{i}.safetensors")
    models = [str(tmp_path / f"m{i}.safetensors") for i in range(2)]
    out, names = tmp_path / "p.safetensors", ["--names", "mnist", "--names", "digits"]
    command = ["pack", *models, "--base", "embedded", "-o", str(out), *names]
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["mnist", "digits"]
    packed, apart = out.stat().st_size, sum(Path(model).stat().st_size for model in models)
    assert packed < 1.1 * apart  # two models: base and vector, and a bit for each weight
    code = ["evaluate", f"{out}:digits", "--base", "embedded", "--tasks", "digits", "--json"]
    assert run(code) == 0
    accuracy = json.loads(capsys.readouterr().out)[0]["metrics"]["acc1"]
    state = open_checkpoint(f"{out}:digits").state_dict()
    own = base.with_form(open_checkpoint(state).form, base.architecture)
    assert evaluate(own, "digits")["digits"]["acc1"] == pytest.approx(accuracy)
    assert run([*command[:-1], "mnist"]) == 2


def test_refusals(tmp_path: Path) -> None:
    base, models = three()
    file = pack(models, base, tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match=r"the models of 3 tasks: a, b, c\nhint: name one"):
        open_checkpoint(file)
    with pytest.raises(UnknownNameError, match=r"no task in .* 'd'"):
        open_checkpoint(f"{file}:d")
    for name in ("x:y", ""):
        with pytest.raises(OptionError, match="can't be the name of a model"):
            pack({name: models["a"]}, base, tmp_path / "x.safetensors")
    with pytest.raises(OptionError, match="one model at least"):
        pack({}, base, tmp_path / "x.safetensors")
    with pytest.raises(OptionError, match="mask_scale is the threshold of TALL masks, and emr"):
        pack(models, base, tmp_path / "x.safetensors", mask_scale=0.4)
    with pytest.raises(OptionError, match="mask_scale is at least 0"):
        pack(models, base, tmp_path / "x.safetensors", method="tall", mask_scale=-1)
    with pytest.raises(OptionError, match=r"one \.safetensors file, not"):
        pack(models, base, tmp_path / "folder")
    with pytest.raises(MismatchError, match="don't match"):
        pack({"a": {"matrix": torch.zeros(2)}}, base, tmp_path / "x.safetensors")
    plain = open_checkpoint(base).save(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="one set of tensors, and so no key 'a'"):
        open_checkpoint(f"{plain}:a")


@pytest.mark.parametrize(
    "damage",
    [
        {"tasks": []},
        {"tasks": ["a", "b"]},
        {"scales": [1.0, 2.0, "x"]},
        {"scales": [1.0, 2.0, float("inf")]},
        {"ties": None},
    ],
)
def test_damaged_metadata(tmp_path: Path, damage: dict[str, Any]) -> None:
    base, models = three()
    file = pack(models, base, tmp_path / "p.safetensors")
    record = json.loads(json.dumps(open_checkpoint(f"{file}:a").source._stored.made_from))  # type: ignore[attr-defined]
    record["base"]["packed"] |= damage
    damaged = tmp_path / "damaged.safetensors"
    save_file(load_file(file), damaged, metadata={"weightops": json.dumps(record)})
    with pytest.raises(CheckpointError, match="metadata aren't sound"):
        open_checkpoint(f"{damaged}:a")
    tensors = load_file(file)
    tensors["masks/vector"] = tensors["masks/vector"][:, :4].contiguous()
    record["base"]["packed"] |= {"tasks": ["a", "b", "c"], "scales": [1.0, 1.0, 1.0], "ties": {}}
    save_file(tensors, damaged, metadata={"weightops": json.dumps(record)})
    with pytest.raises(CheckpointError, match="damaged at vector"):
        open_checkpoint(f"{damaged}:a")
